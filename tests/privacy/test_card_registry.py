"""The entry for the DP Deployments Registry, against the registry's own form."""

from __future__ import annotations

import dataclasses
from datetime import date

import jsonschema
import pytest
import yaml

from sapf_ray.privacy.card_registry import OPEN, is_registrable, registry_yaml

from .test_card_facts import CASES, evolving, facts_of
from .test_planner import small

TEXT = {"type": "string", "minLength": 1}
LISTED = {"type": "array", "items": TEXT, "minItems": 1}


def form(required: bool = True, **fields) -> dict:
    """An object of these fields alone."""
    names = list(fields) if required else []
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": fields,
        "required": names,
    }


def one_of(*values) -> dict:
    return {"enum": list(values)}


# What schemas/deployments-schema.yaml of the registry asks for at commit 3e9c812, tier 3: names of
# fields, types and values. Fields that we leave out are left out here, too.
FORM = form(
    url_slug={"type": "string", "pattern": "^[a-z0-9-]+$"},
    status=one_of("Draft"),
    tier=one_of(1, 2, 3),
    deployment=form(
        basic=form(
            name=TEXT,
            data_curators=LISTED,
            intended_use=TEXT,
            data_product_type=one_of("Synthetic data"),
            data_product_region=TEXT,
            description=TEXT,
            publication_date={"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        ),
        dp_variant=form(
            variant_name=one_of("Approximate DP"),
            data_domain=TEXT,
            unprotected_quantities=TEXT,
        ),
        privacy_loss=form(
            privacy_unit=TEXT,
            privacy_unit_details=TEXT,
            privacy_parameters=form(epsilon={"type": "number"}, delta={"type": "number"}),
            privacy_parameters_details=TEXT,
        ),
        deployment_model=form(
            model_name=one_of("Central"),
            actors=TEXT,
            release_type=one_of("One release"),
            release_type_details=TEXT,
            data_source_type=one_of("Static"),
            access_type=one_of("Non-interactive"),
        ),
        accounting=form(post_processing=TEXT, composition=TEXT),
        implementation=form(
            preprocessing_and_hyperparameter_tuning=TEXT, mechanisms=TEXT, justification=TEXT
        ),
        administrative=form(registry_authors=LISTED),
    ),
)


@pytest.mark.parametrize("config", [small(steps=2), evolving()], ids=["training", "evolution"])
def test_the_entry_has_the_registrys_form(config):
    facts = facts_of(config)
    text = registry_yaml(facts, published=date(2030, 5, 17))
    entry = yaml.safe_load(text)
    jsonschema.validate(entry, FORM)
    deployment = entry["deployment"]
    loss = deployment["privacy_loss"]
    assert loss["privacy_parameters"]["epsilon"] == pytest.approx(facts.spent, abs=1e-6)
    assert loss["privacy_parameters"]["delta"] == facts.delta
    assert loss["privacy_unit_details"] == facts.protected.neighbours
    assert deployment["basic"]["publication_date"] == "2030-05-17"
    for stage in facts.stages:
        assert f"σ = {stage.noise_multiplier:g}" in deployment["implementation"]["mechanisms"]
    assert ("adapter" in deployment["basic"]["description"]) == facts.trains
    assert OPEN in text


def test_a_group_is_named_by_what_makes_it_one():
    config = small(steps=2)
    data = dataclasses.replace(config.data, groups="column:patient")
    facts = facts_of(dataclasses.replace(config, data=data))
    assert "Group-level: all images of one group (data.groups: column:patient)" in registry_yaml(
        facts, published=date(2030, 1, 1)
    )


@pytest.mark.parametrize("name", ["not private", "seeded", "public model alone"])
def test_what_is_no_private_release_is_not_registered(name):
    assert not is_registrable(facts_of(CASES[name]))
