//! Checkpoints drawn as the tree that their parents make.

use std::collections::HashMap;

use jiff::Timestamp;
use oc_proto::v1::Checkpoint;

use super::{mib, status};
use crate::{commands::sandboxes::age, output};

/// Lines are indented no further than this many levels, more than the longest branch has that a sandbox may have: a
/// line stays a line whatever the server says.
const DEEPEST: usize = 128;

/// A node that is yet to be drawn.
struct Pending {
    position: usize,
    /// What its line begins with, and that of its children.
    branch: String,
    trunk: String,
    depth: usize,
}

/// One line for each checkpoint, children below their parent, in the order given. One whose parent is not among them
/// begins a tree of its own; so does the first of those that are, against all reason, each other's ancestors.
pub fn draw(checkpoints: &[Checkpoint], now: Timestamp) -> String {
    let rows = in_order(checkpoints).into_iter().map(|(branch, checkpoint)| {
        [
            format!("{branch}{}", checkpoint.name),
            checkpoint.checkpoint_id.clone(),
            checkpoint.created_at.map(|created| age(created.seconds, now)).unwrap_or_default(),
            mib(checkpoint.memory_changed_bytes),
            mib(checkpoint.disk_changed_bytes),
            status(checkpoint),
            checkpoint.sandbox_id.clone(),
        ]
    });
    output::table(["NAME", "ID", "AGE", "MEMORY CHANGED", "DISK CHANGED", "STATUS", "SANDBOX"], rows)
}

/// Every checkpoint once, parents before their children, with the branches that lead to it.
fn in_order(checkpoints: &[Checkpoint]) -> Vec<(String, &Checkpoint)> {
    let mut positions = HashMap::new();
    for (position, checkpoint) in checkpoints.iter().enumerate() {
        positions.entry(checkpoint.checkpoint_id.as_str()).or_insert(position);
    }
    let mut children = vec![Vec::new(); checkpoints.len()];
    let mut roots = Vec::new();
    for (position, checkpoint) in checkpoints.iter().enumerate() {
        match positions.get(checkpoint.parent_id.as_str()) {
            Some(&parent) if !checkpoint.parent_id.is_empty() => children[parent].push(position),
            _ => roots.push(position),
        }
    }
    let mut drawn = vec![false; checkpoints.len()];
    let mut lines = Vec::with_capacity(checkpoints.len());
    // What no root leads to is in a circle, or hangs on one.
    for start in roots.into_iter().chain(0..checkpoints.len()) {
        if drawn[start] {
            continue;
        }
        let mut pending =
            vec![Pending { position: start, branch: String::new(), trunk: String::new(), depth: 0 }];
        drawn[start] = true;
        while let Some(node) = pending.pop() {
            let mut below = Vec::new();
            for &child in &children[node.position] {
                if !std::mem::replace(&mut drawn[child], true) {
                    below.push(child);
                }
            }
            let last = below.last().copied();
            // The last is taken first.
            pending.extend(below.into_iter().rev().map(|child| node.child(child, Some(child) == last)));
            lines.push((node.branch, &checkpoints[node.position]));
        }
    }
    lines
}

impl Pending {
    fn child(&self, position: usize, is_last: bool) -> Self {
        let (corner, bar) = if is_last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        let branch = format!("{}{corner}", self.trunk);
        if self.depth < DEEPEST {
            Self { position, branch, trunk: format!("{}{bar}", self.trunk), depth: self.depth + 1 }
        } else {
            Self { position, branch, trunk: self.trunk.clone(), depth: self.depth }
        }
    }
}

#[cfg(test)]
mod tests {
    use oc_proto::v1::CheckpointState;
    use proptest::prelude::*;
    use prost_types::Timestamp as ProtoTimestamp;

    use super::*;

    fn checkpoint(id: &str, parent: &str) -> Checkpoint {
        Checkpoint {
            checkpoint_id: id.into(),
            name: format!("n{id}"),
            parent_id: parent.into(),
            ..Checkpoint::default()
        }
    }

    /// Branches and names alone, a line each.
    fn drawn(edges: &[(&str, &str)]) -> Vec<String> {
        let checkpoints: Vec<_> = edges.iter().map(|(id, parent)| checkpoint(id, parent)).collect();
        let lines = in_order(&checkpoints).into_iter();
        lines.map(|(branch, checkpoint)| format!("{branch}{}", checkpoint.name)).collect()
    }

    #[test]
    fn children_are_below_their_parent_in_the_order_they_were_taken() {
        let edges = [("1", ""), ("2", "1"), ("3", "2"), ("4", "1"), ("5", "4"), ("6", "2"), ("7", "")];
        assert_eq!(drawn(&edges), ["n1", "├─ n2", "│  ├─ n3", "│  └─ n6", "└─ n4", "   └─ n5", "n7"]);
    }

    #[test]
    fn a_parent_may_come_after_its_child() {
        assert_eq!(drawn(&[("2", "1"), ("1", "")]), ["n1", "└─ n2"]);
    }

    #[test]
    fn one_whose_parent_is_missing_begins_a_tree() {
        assert_eq!(drawn(&[("1", "gone"), ("2", "1")]), ["n1", "└─ n2"]);
    }

    #[test]
    fn circles_are_cut_open_and_all_of_them_is_drawn() {
        assert_eq!(drawn(&[("1", "1")]), ["n1"]);
        assert_eq!(
            drawn(&[("1", "3"), ("2", "1"), ("3", "2"), ("4", "3"), ("5", "")]),
            ["n5", "n1", "└─ n2", "   └─ n3", "      └─ n4"]
        );
    }

    #[test]
    fn ids_that_are_empty_or_come_twice_are_drawn_as_often_as_they_come() {
        assert_eq!(drawn(&[("", ""), ("1", ""), ("1", ""), ("2", "1")]), ["n", "n1", "└─ n2", "n1"]);
    }

    #[test]
    fn a_line_says_age_and_changes() {
        let first = Checkpoint {
            created_at: Some(ProtoTimestamp { seconds: 40, nanos: 0 }),
            memory_changed_bytes: 3 << 20,
            disk_changed_bytes: 1 << 19,
            state: CheckpointState::Ready.into(),
            sandbox_id: "sb-1".into(),
            ..checkpoint("cp-1", "")
        };
        let second = Checkpoint { checkpoint_id: "cp-2".into(), parent_id: "cp-1".into(), ..first.clone() };
        assert_eq!(
            draw(&[first, second], Timestamp::from_second(100).unwrap()),
            "NAME      ID    AGE  MEMORY CHANGED  DISK CHANGED  STATUS  SANDBOX\n\
             ncp-1     cp-1  1m   3.0MiB          0.5MiB        ready   sb-1\n\
             └─ ncp-1  cp-2  1m   3.0MiB          0.5MiB        ready   sb-1\n"
        );
    }

    #[test]
    fn a_branch_of_any_length_is_drawn_without_lines_of_any_length() {
        let checkpoints: Vec<_> =
            (1..50_000_u32).map(|id| checkpoint(&id.to_string(), &(id - 1).to_string())).collect();
        let lines = in_order(&checkpoints);
        assert_eq!(lines.len(), checkpoints.len());
        assert!(lines.iter().all(|(branch, _)| branch.chars().count() <= 3 * (DEEPEST + 1)));
    }

    proptest! {
        #[test]
        fn whatever_the_parents_each_is_drawn_once(parents in prop::collection::vec(0..20_usize, 0..20)) {
            let checkpoints: Vec<_> = parents
                .iter()
                .enumerate()
                .map(|(id, parent)| checkpoint(&id.to_string(), &parent.to_string()))
                .collect();
            let mut ids: Vec<_> = in_order(&checkpoints)
                .into_iter()
                .map(|(_, checkpoint)| checkpoint.checkpoint_id.parse::<usize>().unwrap())
                .collect();
            ids.sort_unstable();
            prop_assert_eq!(ids, (0..parents.len()).collect::<Vec<_>>());
        }
    }
}
