"""What may come in: checked once, at the face, with an error that says what was found."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_fast.errors import InvalidMessage, SettingsError
from whisper_fast.message import Message, checked_scope
from whisper_fast.settings import Settings


def checked(text="hello", limit=1000, **fields):
    return Message(**{"user": "u", "text": text, **fields}).checked(limit)


@pytest.mark.parametrize("text", ["", "  \n", None, 7, b"bytes"])
def test_no_text(text):
    with pytest.raises(InvalidMessage):
        checked(text)


@pytest.mark.parametrize("text", ["x" * 1001, "ü" * 501, "x" * 10_000_000])
def test_too_much_text(text):
    with pytest.raises(InvalidMessage, match="at most 1000"):
        checked(text)


@pytest.mark.parametrize("text", ["😀", "a\x00b", "ü" * 500, "مرحبا", "日本語"])
def test_unusual_text_is_kept_as_it_is(text):
    assert checked(text).text == text


def test_lone_surrogates_become_replacement_characters():
    assert checked("a\ud83dz").text == "a\ufffdz"


@given(st.text(alphabet=st.characters(), min_size=1))
def test_what_is_accepted_can_be_encoded(text):
    try:
        checked(text).text.encode()
    except InvalidMessage:
        assert not text.strip() or len(text.encode("utf-8", "surrogatepass")) > 1000


@pytest.mark.parametrize("field", ["user", "id", "channel", "platform"])
@pytest.mark.parametrize("wrong", ["", "x" * 513, "x" * 10_000, "a\nb", "a\x00", "\ud800", None, 5])
def test_wrong_ids(field, wrong):
    with pytest.raises(InvalidMessage, match=field):
        checked(**{field: wrong})


@pytest.mark.parametrize("user", ["a/b", "ünï", "a b", "x" * 512, "../../etc/passwd"])
def test_unusual_users(user):
    assert checked(user=user).user == user


@pytest.mark.parametrize("scope", ["dm", "global", "server:1/private", "server:a b/public"])
def test_scopes(scope):
    assert checked_scope(scope) == scope


@pytest.mark.parametrize(
    "scope", ["", "DM", "server:1", "server:/public", "server:a/b/public", "dm\n", "server:1/secret", None]
)
def test_unknown_scopes(scope):
    with pytest.raises(InvalidMessage, match="allowed are"):
        checked_scope(scope)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BATCH_SIZE", "many"),
        ("MAX_CONCURRENT_REQUESTS", "0"),
        ("LLM_REQUEST_TIMEOUT", "-1"),
        ("WHISPER_FAST_PORT", "99999"),
        ("WHISPER_FAST_FEATURE_PARALLEL", "perhaps"),
    ],
)
def test_a_wrong_variable_is_named_with_its_value(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=variable) as wrong:
        Settings()
    assert repr(value) in str(wrong.value)


def test_variables_are_read_and_arguments_win(monkeypatch):
    monkeypatch.setenv("BATCH_SIZE", "7")
    monkeypatch.setenv("THREAD_POOL_SIZE", "3")
    monkeypatch.setenv("WHISPER_FAST_API_KEYS", "first-key, second-key")
    settings = Settings(thread_pool_size=5)
    assert (settings.batch_size, settings.thread_pool_size) == (7, 5)
    assert [key.get_secret_value() for key in settings.api_keys] == ["first-key", "second-key"]
    assert "first-key" not in repr(settings)


def test_a_wrong_secret_is_not_repeated(monkeypatch):
    with pytest.raises(SettingsError) as wrong:
        Settings(api_keys=5)
    assert "5" not in str(wrong.value).replace("WHISPER_FAST_API_KEYS", "")


def test_unknown_arguments_are_refused():
    with pytest.raises(SettingsError, match="colour"):
        Settings(colour="blue")
