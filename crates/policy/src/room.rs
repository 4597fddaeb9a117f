//! How much is freed where the cells run out: one rule for a session and for an attached context.

use super::Params;

/// Of all cells, what is freed at once: each time costs a vote, and cells that are free hold nothing.
const FREED: f64 = 0.25;

/// Of `limit` cells, those that are freed at once.
pub fn freed_at_once(limit: usize) -> usize {
    (FREED * limit as f64) as usize
}

/// How many of `limit` cells may stay, if `needed` of them have to be free; none where more than `always` do always.
pub fn most_cells(always: usize, limit: usize, needed: usize) -> Option<usize> {
    let most = limit.saturating_sub(needed.max(freed_at_once(limit)));
    (most > always).then_some(most)
}

/// Cells that always stay.
pub fn least_cells(policy: &Params) -> usize {
    policy.sinks + policy.recent
}

/// The fewest cells with which [`most_cells`] has an answer for a needed one.
pub fn least_limit(always: usize) -> usize {
    let near = (always.saturating_add(1) as f64 / (1.0 - FREED)) as usize;
    (near.saturating_sub(2)..).find(|&limit| most_cells(always, limit, 1).is_some()).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_is_the_first_that_will_do() {
        for always in (1..300).chain([10_000, 1 << 40]) {
            let least = least_limit(always);
            let most = most_cells(always, least, 1);
            assert!(most.is_some_and(|most| most > always), "{always}: {least}");
            assert_eq!(most_cells(always, least - 1, 1), None, "{always}: {least}");
        }
    }
}
