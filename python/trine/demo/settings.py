"""What can be set about the job. The defaults are those of `make demo`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths of the trainings, the distillation, and what fidelity is measured on."""

    temperature: float = 4.0
    alpha: float = 0.7
    teacher_width: int = 1200
    student_width: int = 800
    teacher_epochs: int = 40
    student_epochs: int = 30
    qat_epochs: int = 20
    sentences: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it must be from 0 to 1")
