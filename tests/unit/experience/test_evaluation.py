from itertools import combinations

import pytest

from megatron_rlsd.experience.evaluation import pass_at_k


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_counts_the_subsets_that_hold_a_correct_response(n):
    for correct in range(n + 1):
        solved = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            subsets = [any(subset) for subset in combinations(solved, k)]
            assert pass_at_k(solved, k) == pytest.approx(sum(subsets) / len(subsets))
