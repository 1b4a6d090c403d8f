"""The judge: learns, is kept, and is asked of what it was told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from est_lora.demo.things import PALETTES, SUBJECTS
from est_lora.demo.world import draw, random_scene
from est_lora.lab import judge as judges
from est_lora.lab.examples import NOTHING, PARTS, STYLE_KINDS
from est_lora.lab.judge import QUESTIONS, Classifier, Judge, trained


class Saying(torch.nn.Module):
    """Always says the same."""

    def __init__(self, answer, parts=()):
        super().__init__()
        self.answer, self.found = answer, parts

    def forward(self, pixels):
        logits = torch.zeros(len(pixels), 5)
        logits[:, self.answer] = 1
        return logits, torch.tensor([1.0 if part in self.found else -1.0 for part in PARTS]).expand(len(pixels), -1)


@pytest.fixture(scope="module")
def pictures():
    return [draw(random_scene(np.random.default_rng(seed), "mipo creature", "vitra style")) for seed in range(3)]


def test_a_verdict_is_about_what_was_asked_for(pictures):
    subject, style = QUESTIONS["subject"].answers[1], QUESTIONS["style"].answers[2]
    judge = Judge({"subject": Saying(1), "style": Saying(2)})
    assert [verdict[:2] for verdict in judge.verdicts(pictures, subject, style)] == [(True, True)] * 3
    other = QUESTIONS["subject"].answers[2]
    assert [verdict[:2] for verdict in judge.verdicts(pictures, other, "lorf style")] == [(False, False)] * 3


def test_nothing_is_never_right(pictures):
    assert QUESTIONS["subject"].answers[0] == QUESTIONS["style"].answers[0] == NOTHING
    judge = Judge({"subject": Saying(0), "style": Saying(0)})
    assert not any(verdict.subject or verdict.style for verdict in judge.verdicts(pictures, "pim robot", "osk style"))


def test_parts_are_those_of_the_subject_asked_for(pictures):
    found = [("mipo creature", "legs"), ("mipo creature", "wings"), ("zubo creature", "horn")]
    judge = Judge({"subject": Saying(1, found), "style": Saying(1)})
    assert judge.verdicts(pictures, "mipo creature", "vitra style")[0].parts == 2 / len(PALETTES["mipo creature"])
    assert judge.verdicts(pictures, "zubo creature", "vitra style")[0].parts == 1 / len(PALETTES["zubo creature"])


def test_it_counts_what_is_right_kind_by_kind():
    judge = Judge({"subject": Saying(0), "style": Saying(0)})
    assert judge.right("style", 5, seed=0) == {kind: float(kind != "the style") for kind in STYLE_KINDS}


def test_training_teaches_and_is_done_once(tmp_path, monkeypatch):
    first = trained("subject", tmp_path, steps=3).state_dict()
    untrained = Classifier(1 + len(SUBJECTS)).state_dict()
    assert any(not torch.equal(value, first[name]) for name, value in untrained.items())
    monkeypatch.setattr(judges, "DataLoader", None)  # would be needed to train again
    kept = trained("subject", tmp_path, steps=3).state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in first.items())


def test_other_steps_are_another_judge(tmp_path, monkeypatch):
    trained("style", tmp_path, steps=1)
    monkeypatch.setattr(judges, "DataLoader", None)
    with pytest.raises(TypeError):
        trained("style", tmp_path, steps=2)
