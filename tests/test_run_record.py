"""What result files say of a run, and what they must not."""

import pytest

from clsgen.run_record import without_secrets


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("--hub_token hf_abcDEF123456", "--hub_token hf_..."),
        ("openai:m@http://alice:s3c@ret@127.0.0.1:9/v1", "openai:m@http://...@127.0.0.1:9/v1"),
        ("https://ghp0123456789abcdef@example.com/x", "https://...@example.com/x"),
        ("git+ssh://git@github.com/a/b", "git+ssh://git@github.com/a/b"),
        ("s3://bucket@v1/notes http://a/x?to=b@c", "s3://bucket@v1/notes http://a/x?to=b@c"),
        ("--hub_token hf_a_mirrors_token", "--hub_token hf_..."),
        ("--output_dir outputs/hf_run", "--output_dir outputs/hf_run"),
    ],
)
def test_tokens_and_passwords_stay_out(said, kept):
    assert without_secrets(said) == kept
