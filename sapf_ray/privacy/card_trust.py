"""The privacy card's sections on all that a guarantee rests on and does not cover.

References:
    1. NIST SP 800-226. Guidelines for evaluating differential privacy guarantees. 2025. (trust
       model, side channels, other releases from the same data, biases)
    2. Mironov. On significance of the least significant bits for differential privacy. CCS 2012.
    3. Papernot, Steinke. Hyperparameter tuning with Rényi differential privacy. ICLR 2022.
"""

from __future__ import annotations

from sapf_ray.privacy.card_facts import CardFacts


def public(facts: CardFacts) -> str:
    """What is assumed to be public."""
    networks = "the public model and its weights"
    if facts.embedding:
        networks += f", and those of the network that compares images ({facts.embedding})"
    return (
        "## Assumed to be public\n\n"
        f"- {_n_units(facts)};\n"
        "- the names of the classes and the prompts made from them, and that synthetic classes are "
        "equally frequent;\n"
        f"- the image size, {networks}, which must not have been trained on these images, or on "
        "others of the same people: what a public model has memorised no noise hides;\n"
        "- every value of the configuration. Hyper-parameters chosen by looking at the sensitive "
        "images would cost further privacy, which this card does not count."
    )


def _n_units(facts: CardFacts) -> str:
    """What is known of the number of units."""
    protected = facts.protected
    n = f"N = {protected.n_units:,}, which sample rate, δ and divisors are made from"
    if protected.nominal:
        return (
            f"{n}: a nominal number, given beforehand (`data.n_records`). How many training "
            f"{facts.unit}s there are enters nothing that is released"
        )
    units = f"{facts.unit}s"
    if facts.unit == "group":
        units = "groups, and that of their images"
    return f"{n}: the number of training {units}, the same for both neighbours"


def trust(facts: CardFacts) -> str:
    """Who sees what; empty where no sensitive image is read."""
    if not facts.reads_images:
        return ""
    return f"## Who sees what\n\n{trust_model(facts)}"


def trust_model(facts: CardFacts) -> str:
    """The trust model in a paragraph."""
    unit = facts.unit
    made = "the synthetic images, their labels"
    if facts.trains:
        made = f"the adapter, {made}"
    who = "Those may be given to anyone." if facts.claim.release else "They are not for release."
    return (
        "Central model: one trusted curator holds the images and runs sapf. The machines of its "
        f"Ray cluster are trusted, too: a worker sees the images or latents of its {unit}s, and "
        "exact sums before noise pass through Ray's object store and the driver, which holds the "
        "key. Nobody else sees anything but what was released with noise, and what is computed "
        f"from that: {made}, ledger, plan and configuration. {who}"
    )


def side_channels(facts: CardFacts) -> str:
    """What an observer of the run could learn beside its releases; empty where none reads
    sensitive images.
    """
    if not facts.reads_images:
        return ""
    items = ";\n".join(f"- {item}" for item in side_channel_items())
    return f"## Side channels\n\n{items}."


def side_channel_items() -> tuple[str, ...]:
    """The channels, one in a few words or a sentence."""
    return (
        "time: how long a step takes tells of the number of records in it. The ledger has no time "
        "stamps and the run directory is its owner's alone, but whoever watches the machines or "
        "their network is not covered",
        "floating point: sums and noise are integers; what is computed from a release after that "
        "needs no care",
        "randomness: noise, samples and diffusion draws come from SHAKE-256 over the run's secret "
        "key; the guarantee holds against those who cannot break it",
        "error messages: a run that stops at an image that it cannot read, or at a class without "
        "images, tells so",
        "memory: other processes of the same user, and copies of the run directory made while the "
        "run was under way, can hold the key or latents",
    )


def unprotected(facts: CardFacts) -> str:
    """What was computed without protection."""
    given = facts.unprotected
    items = ["evaluation against real images: no"]
    if given.evaluation:
        names = ", ".join(f"`{name}`" for name in given.scores)
        names = names or "FID, accuracy, conditional fidelity"
        items = [
            f"evaluation ({names}) against real test and training images: yes. Those scores are "
            "measurements of a research run; they are not covered by ε and should not be released "
            "with the images"
        ]
    if given.skipped:
        items.append("counts of records that could not be read: yes, see below")
    items.append(
        "settings of the run: whether they were chosen by looking at these images is not known to "
        "sapf; a grid's total ε (`sapf tune`) counts its runs, not what people saw of the images"
    )
    items += given.diagnostics
    lines = "\n".join(f"- {item};" for item in items)
    return f"## Computed without protection\n\n{lines[:-1]}."


def randomness(facts: CardFacts) -> str:
    """Where noise came from."""
    text = "## Source of randomness\n\n"
    if facts.seeded:
        return (
            f"{text}A **reproducible seed** from the configuration, for tests and research. "
            "**NOT FOR RELEASE**: repeat the run without `privacy.reproducible_seed`."
        )
    kept = ""
    if facts.keeps_latents:
        kept = (
            " The run's other private files, latents of the sensitive images among them, are kept "
            "(`cluster.keep_cache`)."
        )
    return (
        f"{text}A 256-bit secret from the operating system's cryptographic generator, deleted "
        "after the last release: whoever had it could remove the noise, and knew which images took "
        f"part in each step.{kept}"
    )


def skipped(facts: CardFacts) -> str:
    """Records that could not be read; empty where none were skipped."""
    given = facts.unprotected.skipped
    if not given:
        return ""
    counts = ", ".join(f"{n:,} of the {split} split" for split, n in given.items())
    return (
        f"## Records that could not be read\n\nSkipped (`data.on_error: skip`): {counts}. Such a "
        "record contributes nothing to any sum, so adding or removing it changes nothing, and "
        f"N = {facts.protected.n_units:,} is the number listed, damaged records among them. The "
        "counts are exact and depend on the data: ε does not cover them. Delete this section, and "
        "`skipped` in the card's JSON, before the card is published if they must stay secret."
    )


def utility(facts: CardFacts) -> str:
    """Utility and bias; empty where the public model alone made the images."""
    if not facts.reads_images:
        return ""
    return (
        "## Utility and bias\n\n"
        "Scores on real images are no part of this card: accuracy, also per class, measured on "
        "private images would be another release. Where a test set is public, `sapf evaluate` "
        "gives them per class. Noise and clipping hide first what few images show: rare classes, "
        "minorities and unusual images are learned least, and the bounds on contributions cut off "
        "what is unlike the rest. How many were cut is not stated, for it depends on the images. "
        "Biases of the public model stay."
    )


def limits(facts: CardFacts) -> str:
    """What adds to the guarantee's epsilon from outside."""
    shared = ""
    if facts.shared_selection:
        shared = (
            " The selection here is one release that other runs use as well: it is whole in the ε "
            "of each, and once in the ε of all of them together."
        )
    return (
        "## Known limits\n\n"
        "- Other disclosures about the same images, by other runs or other publications, add to "
        f"this ε. Several runs over the same images add up.{shared}\n"
        "- The mechanisms are sapf's own, and so is their implementation: its tests and `sapf "
        "audit` look for errors, which is no proof that there are none."
    )
