//! Entries that no vote may drop, in addition to the first and the last ones.

use std::sync::Arc;

/// The protected entries, by KV head: after a compaction the same token may be a different entry in each head. Cheap to
/// clone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Protected {
    /// `[list]` entries, ascending: a list for each head, one for all of them, or none.
    lists: Arc<[Vec<u32>]>,
}

impl Protected {
    /// Protects the same entries in every head; ascending.
    pub fn everywhere(entries: Vec<u32>) -> Self {
        Self { lists: Arc::new([entries]) }
    }

    /// Protects `[head]` lists of entries, each ascending.
    pub fn by_head(lists: Vec<Vec<u32>>) -> Self {
        Self { lists: lists.into() }
    }

    /// The entries of one head, ascending.
    pub fn of_head(&self, head: usize) -> &[u32] {
        match &*self.lists {
            [] => &[],
            [all] => all,
            lists => &lists[head],
        }
    }

    /// Returns the largest number of protected entries in any head.
    pub fn most(&self) -> usize {
        self.lists.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Returns the protected entries in `head..tail`. `is_for_all`: entries protected in any head are protected in
    /// every head.
    pub(super) fn between(&self, head: usize, tail: usize, is_for_all: bool) -> Self {
        if self.lists.is_empty() {
            return Self::default();
        }
        let inside = |list: &Vec<u32>| -> Vec<u32> {
            list.iter().copied().filter(|&entry| (head..tail).contains(&(entry as usize))).collect()
        };
        let mut lists: Vec<_> = self.lists.iter().map(inside).collect();
        if is_for_all {
            let mut all = lists.concat();
            all.sort_unstable();
            all.dedup();
            lists = vec![all];
        }
        Self::by_head(lists)
    }
}
