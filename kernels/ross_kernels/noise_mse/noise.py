"""Where the random numbers of the reconstruction loss come from: keys that determine them, or the numbers themselves.

Shape legend (all files of this folder): n images, K draws per image, C latent channels, g patches per side, N = g*g
tokens, C4 = 4 C channels of a grouped latent, T steps of the noise schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

POSTERIOR_STREAM = 0
TIMESTEP_STREAM = 1
EPSILON_STREAM = 2  # draw k uses stream 2 + k
MAX_IMAGES_PER_SAMPLE = 256


@dataclass(frozen=True)
class NoiseKeys:
    """Every number follows from the run seed and the image's key, so none has to be stored or sent.

    Attributes:
        seed: run seed; 64 bits are used.
        keys: int64 [n, 3]: epoch, sample id (below 2^32), image index (below 256).
        num_draws: K.
    """

    seed: int
    keys: Tensor
    num_draws: int

    @property
    def shape(self) -> tuple[int, int]:
        """(K, n)"""
        return self.num_draws, self.keys.shape[0]


@dataclass(frozen=True)
class ExplicitNoise:
    """The numbers themselves, as the definition draws them or a recorded case holds them.

    Attributes:
        t: timesteps, int64 [K, n].
        eps: float32 [K, n, C4, g, g].
        posterior: float32 [n, C, 2g, 2g].
    """

    t: Tensor
    eps: Tensor
    posterior: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(K, n)"""
        return self.t.shape[0], self.t.shape[1]


Noise = NoiseKeys | ExplicitNoise


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = signal[t] z + noise[t] eps; float32 [T] each."""

    signal: Tensor
    noise: Tensor
