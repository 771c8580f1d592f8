//! Arithmetic of runs of pages. All lists are in order, and no two of their runs overlap.

use super::pages::Run;

/// A run of pages, and where it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The pages.
    pub run: Run,
    /// Whether they are those of the upper list.
    pub is_upper: bool,
    /// Where they begin among the pages of their list, one after the other, bytes.
    pub offset: u64,
}

/// What `runs` take, bytes.
pub fn bytes(runs: &[Run]) -> u64 {
    runs.iter().map(|run| run.bytes()).sum()
}

/// The pages that are in either.
pub fn union(one: &[Run], other: &[Run]) -> Vec<Run> {
    join(overlay(one, other).into_iter().map(|piece| piece.run))
}

/// The pages of `lower` with those of `upper` over them, in order.
pub fn overlay(lower: &[Run], upper: &[Run]) -> Vec<Piece> {
    let (mut pieces, mut at) = (Vec::with_capacity(lower.len() + upper.len()), 0);
    for run in upper {
        pieces.push(Piece { run: *run, is_upper: true, offset: at });
        at += run.bytes();
    }
    let (mut at, mut first_above) = (0, 0);
    for run in lower {
        let end = run.0 + run.1;
        while upper.get(first_above).is_some_and(|above| above.0 + above.1 <= run.0) {
            first_above += 1;
        }
        let mut from = run.0;
        let mut add = |from: u32, to: u32| {
            if from < to {
                let offset = at + Run(run.0, from - run.0).bytes();
                pieces.push(Piece { run: Run(from, to - from), is_upper: false, offset });
            }
        };
        for above in upper.iter().skip(first_above).take_while(|above| above.0 < end) {
            add(from, above.0);
            from = from.max(above.0 + above.1);
        }
        add(from, end);
        at += run.bytes();
    }
    pieces.sort_unstable_by_key(|piece| piece.run.0);
    pieces
}

/// Makes one of those that follow each other.
pub fn join(runs: impl Iterator<Item = Run>) -> Vec<Run> {
    let mut joined: Vec<Run> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last) if last.0 + last.1 == run.0 => last.1 += run.1,
            _ => joined.push(run),
        }
    }
    joined
}

/// Makes a list of runs that are in any order and overlap.
pub fn settled(mut runs: Vec<Run>) -> Vec<Run> {
    runs.sort_unstable_by_key(|run| run.0);
    let mut settled: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs.into_iter().filter(|run| run.1 > 0) {
        match settled.last_mut() {
            Some(last) if last.0 + last.1 >= run.0 => last.1 = last.1.max(run.0 + run.1 - last.0),
            _ => settled.push(run),
        }
    }
    settled
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;
    use crate::driver::pages::PAGE;

    fn runs() -> impl Strategy<Value = Vec<Run>> {
        let pages = proptest::collection::btree_set(0_u32..60, 0..40);
        // Some that follow each other stay apart.
        (pages, any::<u64>()).prop_map(|(pages, apart)| {
            let mut runs: Vec<Run> = Vec::new();
            for page in pages {
                match runs.last_mut() {
                    Some(last) if last.0 + last.1 == page && apart >> page & 1 == 0 => last.1 += 1,
                    _ => runs.push(Run(page, 1)),
                }
            }
            runs
        })
    }

    fn pages(runs: &[Run]) -> Vec<u32> {
        runs.iter().flat_map(|run| run.0..run.0 + run.1).collect()
    }

    proptest! {
        #[test]
        fn each_page_is_once_there_and_the_upper_one_wins(lower in runs(), upper in runs()) {
            let pieces = overlay(&lower, &upper);
            let found: Vec<u32> = pieces.iter().flat_map(|piece| pages(&[piece.run])).collect();
            let all: BTreeSet<u32> = pages(&lower).into_iter().chain(pages(&upper)).collect();
            prop_assert_eq!(&found, &all.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(pages(&union(&lower, &upper)), found);
            let (below, above): (BTreeMap<u64, u32>, BTreeMap<u64, u32>) =
                (places(&lower), places(&upper));
            for piece in pieces {
                for number in 0..piece.run.1 {
                    let page = piece.run.0 + number;
                    let list = if piece.is_upper { &above } else { &below };
                    prop_assert_eq!(list.get(&(piece.offset + u64::from(number) * PAGE)), Some(&page));
                    prop_assert_eq!(piece.is_upper, pages(&upper).contains(&page));
                }
            }
        }
    }

    #[test]
    fn a_list_is_made_of_any_runs() {
        let any = vec![Run(7, 3), Run(0, 2), Run(2, 0), Run(8, 1), Run(2, 1), Run(9, 4), Run(20, 1)];
        assert_eq!(settled(any), [Run(0, 3), Run(7, 6), Run(20, 1)]);
        assert_eq!(settled(vec![]), []);
    }

    /// Which page is where in a file with `runs`.
    fn places(runs: &[Run]) -> BTreeMap<u64, u32> {
        pages(runs).into_iter().enumerate().map(|(number, page)| (number as u64 * PAGE, page)).collect()
    }
}
