//! What the pool makes and throws away next: a function of what it holds and of what the host can spare.

/// One kind of clone: what is wanted of it and what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shelf {
    /// Clones that should wait.
    pub target: usize,
    /// Clones that wait.
    pub ready: usize,
    /// Clones being made.
    pub making: usize,
    /// Whether making one failed lately: none is made until the time to wait is over.
    pub resting: bool,
}

/// What the host can spare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Memory that could be had, MiB.
    pub available_mb: u64,
    /// Memory that the pool must leave alone, MiB.
    pub reserve_mb: u64,
    /// What one waiting clone is expected to take, MiB.
    pub clone_mb: u64,
    /// Whether its disk has space for more.
    pub disk: bool,
    /// Creates in progress: they need the processors more than the pool does.
    pub creates: usize,
    /// Clones that may be made at the same time.
    pub parallel: usize,
}

/// One thing to do, for the shelf of that index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make a clone.
    Make(usize),
    /// Throw a waiting clone away.
    Evict(usize),
}

/// Plans the next steps.
///
/// Clones are evicted where there are more than wanted, and where the host's memory falls below the reserve;
/// they are made only while one more would leave the reserve whole, so the two never chase each other.
pub fn plan(shelves: &[Shelf], room: Room) -> Vec<Step> {
    let mut shelves = shelves.to_vec();
    let mut steps = Vec::new();

    for (index, shelf) in shelves.iter_mut().enumerate() {
        for _ in shelf.target..shelf.ready {
            steps.push(Step::Evict(index));
        }
        shelf.ready = shelf.ready.min(shelf.target);
    }

    let short_mb = room.reserve_mb.saturating_sub(room.available_mb);
    for _ in 0..short_mb.div_ceil(room.clone_mb.max(1)) {
        let fullest = (0..shelves.len()).filter(|&i| shelves[i].ready > 0).max_by_key(|&i| shelves[i].ready);
        let Some(fullest) = fullest else { break };
        shelves[fullest].ready -= 1;
        steps.push(Step::Evict(fullest));
    }

    if room.creates > 0 || !room.disk || short_mb > 0 {
        return steps;
    }
    let making: usize = shelves.iter().map(|shelf| shelf.making).sum();
    let spare_mb = room.available_mb - room.reserve_mb;
    let affordable = usize::try_from(spare_mb / room.clone_mb.max(1)).unwrap_or(usize::MAX);
    for _ in making..room.parallel.min(affordable) {
        let emptiest = (0..shelves.len())
            .filter(|&i| !shelves[i].resting && shelves[i].ready + shelves[i].making < shelves[i].target)
            // Filled by share, so that a small shelf does not wait until a large one is full.
            .min_by_key(|&i| (shelves[i].ready + shelves[i].making) * 1000 / shelves[i].target);
        let Some(emptiest) = emptiest else { break };
        shelves[emptiest].making += 1;
        steps.push(Step::Make(emptiest));
    }
    steps
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROOM: Room =
        Room { available_mb: 10_000, reserve_mb: 1_000, clone_mb: 100, disk: true, creates: 0, parallel: 2 };

    fn shelf(target: usize, ready: usize, making: usize) -> Shelf {
        Shelf { target, ready, making, resting: false }
    }

    fn shelves() -> impl Strategy<Value = Vec<Shelf>> {
        let shelf = (0..30_usize, 0..40_usize, 0..4_usize, any::<bool>())
            .prop_map(|(target, ready, making, resting)| Shelf { target, ready, making, resting });
        prop::collection::vec(shelf, 0..4)
    }

    fn rooms() -> impl Strategy<Value = Room> {
        (0..5_000_u64, 0..2_000_u64, 1..300_u64, any::<bool>(), 0..3_usize, 0..5_usize).prop_map(
            |(available_mb, reserve_mb, clone_mb, disk, creates, parallel)| Room {
                available_mb,
                reserve_mb,
                clone_mb,
                disk,
                creates,
                parallel,
            },
        )
    }

    proptest! {
        #[test]
        fn never_beyond_what_is_wanted_allowed_or_there(shelves in shelves(), room in rooms()) {
            let steps = plan(&shelves, room);
            let count = |step| steps.iter().filter(|&&s| s == step).count();
            let mut making = 0;
            let mut made = 0;
            for (index, shelf) in shelves.iter().enumerate() {
                prop_assert!(count(Step::Evict(index)) <= shelf.ready);
                let new = count(Step::Make(index));
                prop_assert!(new == 0 || shelf.ready + shelf.making + new <= shelf.target);
                prop_assert!(new == 0 || !shelf.resting);
                making += shelf.making;
                made += new;
            }
            prop_assert!(made == 0 || making + made <= room.parallel);
            prop_assert!(made == 0 || room.creates == 0);
            let left = room.available_mb.saturating_sub(made as u64 * room.clone_mb);
            prop_assert!(made == 0 || left >= room.reserve_mb);
        }

        #[test]
        fn once_done_nothing_is_left_to_throw_away(shelves in shelves(), room in rooms()) {
            let mut after = shelves.clone();
            let mut room = room;
            for step in plan(&shelves, room) {
                match step {
                    Step::Make(i) => {
                        after[i].ready += 1;
                        room.available_mb = room.available_mb.saturating_sub(room.clone_mb);
                    }
                    Step::Evict(i) => {
                        after[i].ready -= 1;
                        room.available_mb += room.clone_mb;
                    }
                }
            }
            let next = plan(&after, room);
            prop_assert!(next.iter().all(|step| matches!(step, Step::Make(_))), "{next:?}");
        }
    }

    #[test]
    fn an_empty_pool_fills_as_many_at_once_as_allowed() {
        assert_eq!(plan(&[shelf(24, 0, 0)], ROOM), [Step::Make(0), Step::Make(0)]);
        assert_eq!(plan(&[shelf(24, 3, 1)], ROOM), [Step::Make(0)]);
        assert_eq!(plan(&[shelf(24, 24, 0)], ROOM), []);
    }

    #[test]
    fn the_emptier_shelf_comes_first() {
        assert_eq!(plan(&[shelf(20, 5, 0), shelf(2, 0, 0)], ROOM), [Step::Make(1), Step::Make(0)]);
    }

    #[test]
    fn creates_come_first() {
        assert_eq!(plan(&[shelf(24, 0, 0)], Room { creates: 1, ..ROOM }), []);
    }

    #[test]
    fn short_memory_empties_the_fullest_shelf() {
        let room = Room { available_mb: 850, ..ROOM };
        assert_eq!(plan(&[shelf(4, 1, 0), shelf(9, 6, 0)], room), [Step::Evict(1), Step::Evict(1)]);
    }
}
