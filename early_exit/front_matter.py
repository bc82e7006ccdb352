"""The fields of a card that model hubs read: YAML between two lines of `---`, before the text.

Their names are those of https://github.com/huggingface/hub-docs/blob/main/modelcard.md; the
identifiers of licences are those of https://huggingface.co/docs/hub/repositories-licenses.
"""

import re
from typing import Any

import yaml

from early_exit.classifier import val_from_of
from early_exit.system.text import in_a_line

LIBRARY = "early-exit"
TASK = {"type": "image-classification", "name": "Image classification"}
NOT_STATED = "not stated"
LICENCES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gfdl gpl gpl-2.0 gpl-3.0 isc
    lgpl lgpl-2.1 lgpl-3.0 lgpl-lr lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail
    openrail++ osl-3.0 pddl postgresql unknown unlicense wtfpl zlib
    """.split()
)
"""The identifiers of licences. Those of single companies' models are left out."""


def front_matter(report: dict[str, Any], licence: str, data_id: str | None = None) -> str:
    """The fields, from the report of an evaluation.

    licence: as the user states it; data_id: the data set's identifier on a hub; default: its name
    in the report.
    """
    run, test, exits = report["run"], report["test"], report["exits"]
    taken = [
        _metric("accuracy", "accuracy with exits taken", test["accuracy"]),
        _metric("accuracy", "accuracy of the final exit", exits[-1]["accuracy"]),
        _metric(
            "macs_share",
            "multiply-adds per image, share of the plain network's",
            test["macs_share"],
        ),
    ]
    plain = len(exits) == 1
    data_id = data_id or _slug(run["dataset"], "._/-")
    fields: dict[str, Any] = {
        **licence_fields(licence),
        "library_name": LIBRARY,
        "pipeline_tag": TASK["type"],
        "datasets": [data_id],
        "metrics": ["accuracy"],
        "tags": [LIBRARY, *([] if plain else ["multi-exit"]), in_a_line(str(run["arch"]))],
        "model-index": [
            {
                "name": in_a_line(f"{run['arch']}, {run['dataset']}"),
                "results": [
                    {
                        "task": TASK,
                        "dataset": {
                            "type": data_id,
                            "name": _images(report),
                            "split": "test",
                        },
                        "metrics": [_metric("accuracy", "accuracy", test["accuracy"])]
                        if plain
                        else taken,
                    }
                ],
            }
        ],
    }
    return f"---\n{yaml.dump(fields, Dumper=_Dumper, sort_keys=False, width=100)}---\n"


class _Dumper(yaml.SafeDumper):
    """Writes a value again where it occurs again: hubs' readers may not know YAML's references."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def licence_fields(text: str) -> dict[str, str]:
    """A licence in the identifiers of hubs: one of `LICENCES`, or `other` and the text as its name.

    Only a text that is an identifier, but for case, blanks and the word licence, is taken for it: a
    longer one may have conditions.
    """
    if text == NOT_STATED:
        return {"license": "unknown"}
    words = re.sub(r"\blicen[cs]e\b", " ", text.lower()).split()
    if (identifier := "-".join(words)) in LICENCES:
        return {"license": identifier}
    return {"license": "other", "license_name": _slug(text.lower(), ".-")}


def _images(report: dict[str, Any]) -> str:
    """The images that the metrics are of, in words."""
    half = ", half of the official ones" if val_from_of(report) == "test" else ""
    return (
        f"{in_a_line(str(report['run']['dataset']))}, test"
        f" ({report['choice']['test_images']:,} images{half})"
    )


def _metric(kind: str, name: str, value: float) -> dict[str, Any]:
    return {"type": kind, "name": name, "value": round(float(value), 6)}


def _slug(text: str, also: str) -> str:
    """A text with a hyphen for everything but letters, digits and the characters `also`."""
    return re.sub(rf"[^A-Za-z0-9{re.escape(also)}]+", "-", str(text)).strip("-") or "unnamed"
