"""Other languages: recall is not worse than plain vectors, nor than the words as they were written."""

from __future__ import annotations

import re

import numpy as np
import pytest

from whisper_fast.memory import MemoryStore
from whisper_fast.models.embedder import StaticEmbedder

K = 1
# ruff: noqa: RUF001 - these are question marks of their scripts
TALKS = {
    "German": [
        ("Gestern habe ich mir ein neues Fahrrad gekauft.", "Wann hast du das Fahrrad gekauft?"),
        ("Meine Schwester wohnt seit drei Jahren in Hamburg.", "In welcher Stadt wohnt deine Schwester?"),
        ("Zum Frühstück esse ich am liebsten Brötchen mit Käse.", "Was isst du zum Frühstück?"),
        ("Unser Hund heißt Bello und ist sehr alt.", "Wie heißt euer Hund?"),
        ("Im Sommer fahren wir immer an die Nordsee.", "Wohin fahrt ihr im Sommer?"),
        ("Ich lerne gerade Klavier spielen.", "Welches Instrument lernst du, Klavier oder Geige?"),
    ],
    "Spanish": [
        ("Ayer compré una bicicleta nueva.", "¿Cuándo compraste la bicicleta?"),
        ("Mi hermana vive en Sevilla desde hace tres años.", "¿Dónde vive tu hermana?"),
        ("Para desayunar me gusta el pan con tomate.", "¿Qué pan te gusta desayunar?"),
        ("Nuestro perro se llama Toby y es muy viejo.", "¿Cómo se llama vuestro perro?"),
        ("En verano siempre vamos a la playa de Cádiz.", "¿Adónde vais en verano?"),
        ("Estoy aprendiendo a tocar el piano.", "¿Tocas el piano o el violín?"),
    ],
    "Japanese": [
        ("昨日、新しい自転車を買いました。", "自転車はいつ買ったの？"),
        ("妹は三年前から大阪に住んでいます。", "妹さんはどこに住んでいますか？"),
        ("朝ごはんにはパンとチーズが好きです。", "朝ごはんは何が好き？"),
        ("うちの犬の名前はポチで、とても年を取っています。", "犬の名前は何ですか？"),
        ("夏にはいつも海へ行きます。", "夏はどこへ行きますか？"),
        ("今ピアノを習っています。", "ピアノを習っているの？"),
    ],
    "Arabic": [
        ("اشتريت دراجة جديدة أمس.", "متى اشتريت الدراجة؟"),
        ("أختي تسكن في القاهرة منذ ثلاث سنوات.", "أين تسكن أختك؟"),
        ("أحب الخبز والجبن في الفطور.", "ماذا تحب في الفطور؟"),
        ("كلبنا اسمه بوبي وهو كبير في السن.", "ما اسم كلبكم؟"),
        ("في الصيف نسافر دائما إلى البحر.", "إلى أين تسافرون في الصيف؟"),
        ("أتعلم العزف على البيانو.", "هل تعزف على البيانو؟"),
    ],
    "emoji": [
        ("got this today 🚲", "🚲?"),
        ("she moved away 🏠 😢", "what about the 🏠"),
        ("every morning 🥐☕", "🥐"),
        ("look at him 🐶", "🐶 photo"),
        ("we went there 🏖️", "🏖️ when?"),
        ("practising 🎹", "🎹🎹"),
    ],
}


def by_vectors(said, asked, embedder):
    return (embedder.embed(asked) @ embedder.embed(said).T).argmax(axis=1).tolist()


def by_words(said, asked, embedder):
    """How many words they share, as they are written."""
    held = [set(re.findall(r"\w+", text.lower())) for text in said]
    return [int(np.argmax([len(words & set(re.findall(r"\w+", q.lower()))) for words in held])) for q in asked]


@pytest.fixture(scope="module")
def embedder():
    return StaticEmbedder()


@pytest.mark.parametrize("language", TALKS)
async def test_recall_is_not_worse_than_vectors_or_plain_words(tmp_path, embedder, language):
    said, asked = zip(*TALKS[language], strict=True)
    async with MemoryStore.open(tmp_path, embedder) as memory:
        numbers = await memory.add_many("u", [{"text": text, "at": n * 86_400.0} for n, text in enumerate(said)])
        found = [numbers.index((await memory.recall("u", query, k=K))[0].id) for query in asked]
    right = sum(row == n for n, row in enumerate(found))
    for other in (by_vectors, by_words):
        assert right >= sum(row == n for n, row in enumerate(other(said, asked, embedder))), other.__name__
    assert right >= 5, found
