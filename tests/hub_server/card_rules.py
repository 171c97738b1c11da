"""A documented subset of what the Hub asks of a card's metadata."""

import re

import yaml  # a dependency of huggingface_hub

LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "gpl-3.0", "llama3.1", "gemma", "other"}
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def validate_card(content, kind):
    """A documented subset of the Hub's card schema -> (errors, warnings)."""
    m = re.match(r"---\r?\n(.*?)\r?\n?---\s*(\n|$)", content.lstrip("\ufeff"), re.S)
    if not m or not m[1].strip():
        if kind == "space":
            return ["Missing configuration in README"], []
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        card = yaml.safe_load(m[1])
    except yaml.YAMLError as e:
        return [f"invalid YAML in metadata: {e}".replace("\n", " ")], []
    if not isinstance(card, dict):
        return ["metadata must be a YAML mapping"], []
    bad = []
    for lic in [card["license"]] if isinstance(card.get("license"), str) else card.get("license") or []:
        if lic not in LICENSES:
            bad.append(f'"license" must be one of the known license ids, got {lic!r}')
    for key in ("tags", "datasets", "task_categories", "size_categories"):
        if key in card and not isinstance(card[key], (list, str)):
            bad.append(f'"{key}" must be an array')
    for lang in [card["language"]] if isinstance(card.get("language"), str) else card.get("language") or []:
        if not isinstance(lang, str) or not re.fullmatch(r"[a-z]{2,8}(-[A-Za-z0-9]+)*|code", lang):
            bad.append(f'"language" holds {lang!r}: it must be a lowercase language code')
    if kind == "space":
        if card.get("sdk") not in ("gradio", "streamlit", "docker", "static"):
            bad.append('"sdk" must be one of [gradio, streamlit, docker, static]')
        for key in ("colorFrom", "colorTo"):
            if key in card and card[key] not in COLORS:
                bad.append(f'"{key}" must be one of {sorted(COLORS)}')
        if len(str(card.get("short_description") or "")) > 60:
            bad.append('"short_description" length must be less than or equal to 60 characters long')
    return bad, []
