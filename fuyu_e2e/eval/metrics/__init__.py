"""The metrics, by their names in task files."""

from collections.abc import Mapping

from fuyu_e2e.eval.metric import Metric
from fuyu_e2e.eval.metrics.bleu import Bleu
from fuyu_e2e.eval.metrics.boxes import BoxOverlap
from fuyu_e2e.eval.metrics.cider import CiderD
from fuyu_e2e.eval.metrics.edits import CharacterErrorRate, anls
from fuyu_e2e.eval.metrics.equality import accuracy, exact_match
from fuyu_e2e.eval.metrics.mean import Mean
from fuyu_e2e.eval.metrics.rouge import rouge_l
from fuyu_e2e.eval.metrics.vqa import vqa_accuracy

METRICS: Mapping[str, Metric] = {
    "exact_match": Mean(exact_match),
    "accuracy": Mean(accuracy),
    "vqa_accuracy": Mean(vqa_accuracy),
    "anls": Mean(anls),
    "character_error_rate": CharacterErrorRate(),
    "bleu": Bleu(),
    "cider": CiderD(),
    "rouge_l": Mean(rouge_l),
    "box_iou": BoxOverlap(),
    "box_iou_50": BoxOverlap(bound=0.5),
}
