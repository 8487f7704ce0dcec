"""Catalogs: what may be declared; what makes no sense is refused with the row's name."""

import pytest

from models.catalog import BadCatalog, families

VARIANT = {"name": '"mine"', "kind": '"unet"', "steps": "[4, 5]"}
FAMILY = {"like": '"embedded"', "file": '"mine.safetensors"', "default": '"mine"'}
GUIDANCE = "{{ default = {}, minimum = {}, maximum = {} }}"


def toml(family=FAMILY, *variants):
    rows = [f"{key} = {value}" for key, value in family.items()]
    for variant in variants or (VARIANT,):
        rows += ["[[family.own.variant]]", *(f"{key} = {value}" for key, value in variant.items())]
    return "\n".join(["[family.own]", *rows])


def test_a_family_takes_sizes_and_layout_of_what_it_is_like_and_what_is_left_out_is_lightnings():
    own = families({"/x/models.toml": toml()})["own"]
    like = own.like
    assert (own.size, own.components, own.root.as_posix()) == (like.size, like.components, "/x")
    (variant,) = own.variants.values()
    declared = (variant.prediction_type, variant.sampler, variant.spacing, variant.sigmas, variant.guidance)
    assert (variant.steps, *declared) == ((4, 5), "epsilon", "euler", "trailing", None, None)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"steps": "0"}, ">= 1"),
        ({"steps": "65"}, "<= 64"),
        ({"steps": "[]"}, "a number, or a list"),
        ({"steps": "[4, 4]"}, "a number, or a list"),
        ({"steps": "true"}, "got `bool`"),
        ({"steps": '"4"'}, "got `str`"),
        ({"kind": '"net"'}, "'net'"),
        ({"kind": '"lora"'}, "must have a file"),
        ({"file": '"mine.ckpt"'}, "only safetensors"),
        ({"sampler": '"dpmpp_sde"'}, "'dpmpp_sde'"),
        ({"sampler": '"euler_ancestral"', "sigmas": '"karras"'}, "euler_ancestral needs"),
        ({"sampler": '"euler_ancestral"', "prediction_type": '"sample"'}, "euler_ancestral needs"),
        ({"prediction_type": '"v_prediction"'}, "'v_prediction'"),
        ({"spacing": '"trailling"'}, "'trailling'"),
        ({"step": "4"}, "`step`"),
        ({"guidance": GUIDANCE.format(3, 1, 2)}, "minimum <= default <= maximum"),
        ({"guidance": GUIDANCE.format(1, 1, "inf")}, "minimum <= default <= maximum"),
        ({"guidance": "1.5"}, r"\$\.guidance"),
        ({"name": '"a b"'}, r"\$\.name"),
    ],
)
def test_a_variant_that_makes_no_sense_is_refused_by_its_name(changed, reason):
    with pytest.raises(BadCatalog, match=rf"^models\.toml: family own, variant (mine|a b): .*{reason}[^\n]*$"):
        families({"/x/models.toml": toml(FAMILY, {**VARIANT, **changed})})


LORA = {"name": '"l"', "kind": '"lora"', "steps": "4", "file": '"l.safetensors"'}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"like": '"sd15"'}, "like must be one of sdxl, embedded, not sd15"),
        ({"directory": '"x"'}, "one of file, directory and repository"),
        ({"file": '"x.ckpt"'}, "only safetensors"),
        ({"vae": '"sdxl"'}, "vae must be embedded"),
        ({"default": '"other"'}, "default must be one of mine, not other"),
        ({"repository": '{ id = "a/b" }'}, "`revision`"),
        ({"colour": "1"}, "`colour`"),
    ],
)
def test_a_family_that_makes_no_sense_is_refused_by_its_name(changed, reason):
    with pytest.raises(BadCatalog, match=rf"^models\.toml: family own: .*{reason}"):
        families({"/x/models.toml": toml({**FAMILY, **changed})})


def test_a_lightning_lora_on_a_lightning_merge_is_refused():
    with pytest.raises(BadCatalog, match="family own: variant l would distil anew what is a Lightning merge already"):
        families({"/x/models.toml": toml(FAMILY, VARIANT, LORA)})
    assert len(families({"/x/models.toml": toml({**FAMILY, "default": '"l"'}, LORA)})["own"].variants) == 1


@pytest.mark.parametrize(
    "text", ["[family", "x = 1", "family = 1", "[family]\nown = 1", "", toml(FAMILY, VARIANT, VARIANT)]
)
def test_what_is_no_catalog_is_refused_with_the_files_name(text):
    with pytest.raises(BadCatalog, match=r"models\.toml"):
        families({"/x/models.toml": text})


def test_our_names_cannot_be_taken():
    with pytest.raises(BadCatalog, match="family sdxl: there is one of this name already"):
        families({"/x/models.toml": toml().replace("family.own", "family.sdxl")})
