//! Where a sandbox goes: power of two choices. Of the hosts on which it fits two are drawn, and the better one takes
//! it. That spreads nearly as well as looking for the best of all, and many schedulers with slightly old knowledge do
//! not all send their sandboxes to the same host.

use oc_proto::mesh::HostRecord;
use thiserror::Error;

use crate::ledger::account::Count;

/// A host with less free disk than this takes nothing new, MiB: its sandboxes need room to write.
const MIN_DISK_FREE_MB: i64 = 1024;
/// What a clone that waits in the pool is worth, in free shares of a host: it saves a restore.
const WARM_BONUS: f64 = 0.25;

/// What is asked of a host.
#[derive(Clone, Copy, Debug)]
pub struct Need<'a> {
    /// The template.
    pub template_id: &'a str,
    /// Its share.
    pub share: Count,
    /// Hosts that have failed to make it.
    pub avoid: &'a [String],
    /// What its host must have, if it is made of a snapshot that is in an object store.
    pub like: Option<&'a Like>,
}

/// What makes a host as good for a snapshot as the one that took it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Like {
    /// The object store that has the snapshot.
    pub object_store_id: String,
    /// The base image that its disk boots with. Where that is not known, the host sees.
    pub base_digest: String,
    /// What its memory depends on; empty if that is not known, or its disk is to boot.
    pub snapshot_key: String,
}

impl Like {
    /// The same, for a snapshot whose disk is to boot.
    #[must_use]
    pub fn for_disk(self) -> Self {
        Self { snapshot_key: String::new(), ..self }
    }

    /// Whether a host is.
    pub fn is_met_by(&self, host: &HostRecord) -> bool {
        let has = |given: &[String], wanted: &String| wanted.is_empty() || given.contains(wanted);
        host.object_store_id == self.object_store_id
            && has(&host.base_digests, &self.base_digest)
            && has(&host.snapshot_keys, &self.snapshot_key)
    }
}

/// A host, and what is promised on it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// The host.
    pub host: &'a HostRecord,
    /// Promised.
    pub promised: Count,
}

/// No host takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Unplaceable {
    /// No host is a member, or all have been tried.
    #[error("no host is available at the moment, try again later")]
    NoHost,
    /// No host has the template.
    #[error("there is no such template")]
    NoTemplate,
    /// Every host with the template is full.
    #[error("no host has room left for it, try again later")]
    Full,
    /// There is room, but no disk space.
    #[error("no host has disk space left, try again later")]
    DiskFull,
}

/// Chooses a host. `draw(n)` draws a number below `n`.
///
/// # Errors
///
/// [`Unplaceable`] if it fits on none.
pub fn place<'a>(
    need: Need<'_>,
    candidates: &[Candidate<'a>],
    draw: &mut dyn FnMut(usize) -> usize,
) -> Result<&'a HostRecord, Unplaceable> {
    let untried = candidates.iter().filter(|candidate| !need.avoid.contains(&candidate.host.host_id));
    let mut reason = Unplaceable::NoHost;
    let mut fitting = Vec::new();
    for candidate in untried {
        match fits(&need, candidate) {
            Ok(()) => fitting.push(candidate),
            // The reason of the host that came closest.
            Err(missing) => reason = closer(reason, missing),
        }
    }
    let best = match fitting.as_slice() {
        [] => return Err(reason),
        [only] => only,
        several => {
            let first = draw(several.len()) % several.len();
            let other = draw(several.len() - 1) % (several.len() - 1);
            let second = if other >= first { other + 1 } else { other };
            let (first, second) = (several[first], several[second]);
            if score(second) > score(first) { second } else { first }
        }
    };
    Ok(best.host)
}

fn fits(need: &Need<'_>, candidate: &Candidate<'_>) -> Result<(), Unplaceable> {
    let Candidate { host, promised } = candidate;
    if need.like.is_some_and(|like| !like.is_met_by(host)) {
        return Err(Unplaceable::NoHost);
    }
    if !host.templates.iter().any(|template| template == need.template_id) {
        return Err(Unplaceable::NoTemplate);
    }
    let sandboxes = promised.sandboxes.saturating_add(need.share.sandboxes);
    let memory_mb = promised.memory_mb.saturating_add(need.share.memory_mb);
    if sandboxes > host.max_sandboxes || memory_mb > host.memory_capacity_mb {
        return Err(Unplaceable::Full);
    }
    if host.disk_free_mb < MIN_DISK_FREE_MB {
        return Err(Unplaceable::DiskFull);
    }
    Ok(())
}

fn closer(left: Unplaceable, right: Unplaceable) -> Unplaceable {
    let distance = |reason: &Unplaceable| match reason {
        Unplaceable::NoHost => 3,
        Unplaceable::NoTemplate => 2,
        Unplaceable::Full => 1,
        Unplaceable::DiskFull => 0,
    };
    if distance(&right) < distance(&left) { right } else { left }
}

/// How gladly a host takes it: free share of its memory and of its places, and whether a clone waits.
fn score(candidate: &Candidate<'_>) -> f64 {
    let Candidate { host, promised } = candidate;
    let free = |used: f64, all: f64| if all > 0.0 { 1.0 - used / all } else { 0.0 };
    // Promises and capacities are far below 2^52: as floats they are exact.
    let memory = free(promised.memory_mb as f64, host.memory_capacity_mb as f64);
    let places = free(f64::from(promised.sandboxes), f64::from(host.max_sandboxes));
    memory + places + if host.pool_ready > 0 { WARM_BONUS } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHARE: Count = Count { sandboxes: 1, memory_mb: 1024 };
    const NEED: Need<'_> = Need { template_id: "base", share: SHARE, avoid: &[], like: None };

    fn host(name: &str) -> HostRecord {
        HostRecord {
            host_id: name.into(),
            templates: vec!["base".into()],
            max_sandboxes: 10,
            memory_capacity_mb: 10_240,
            disk_free_mb: 100_000,
            ..Default::default()
        }
    }

    fn promised(sandboxes: i32) -> Count {
        Count { sandboxes, memory_mb: i64::from(sandboxes) * 1024 }
    }

    fn chosen(hosts: &[(HostRecord, Count)], need: Need<'_>) -> Result<String, Unplaceable> {
        let candidates: Vec<_> =
            hosts.iter().map(|(host, promised)| Candidate { host, promised: *promised }).collect();
        place(need, &candidates, &mut |_| 0).map(|host| host.host_id.clone())
    }

    #[test]
    fn a_snapshot_goes_where_its_store_and_all_that_it_depends_on_are() {
        let of = |name: &str, store: &str, key: &str, base: &str| HostRecord {
            object_store_id: store.into(),
            snapshot_keys: vec!["older".into(), key.into()],
            base_digests: vec!["older".into(), base.into()],
            ..host(name)
        };
        let hosts = [
            (of("no-store", "", "k1", "b1"), promised(0)),
            (of("other-store", "s2", "k1", "b1"), promised(0)),
            (of("other-base", "s1", "k2", "b2"), promised(0)),
            (of("other-processor", "s1", "k2", "b1"), promised(0)),
            (of("busy", "s1", "k1", "b1"), promised(9)),
        ];
        let live = Like { object_store_id: "s1".into(), snapshot_key: "k1".into(), base_digest: "b1".into() };
        assert_eq!(chosen(&hosts, Need { like: Some(&live), ..NEED }).unwrap(), "busy");
        let full = [
            (of("busy", "s1", "k1", "b1"), promised(10)),
            (of("other-processor", "s1", "k2", "b1"), promised(0)),
        ];
        assert_eq!(chosen(&full, Need { like: Some(&live), ..NEED }), Err(Unplaceable::Full));
        // A disk boots wherever its base image is.
        let cold = live.for_disk();
        assert_eq!(chosen(&full, Need { like: Some(&cold), ..NEED }).unwrap(), "other-processor");
        assert_eq!(chosen(&hosts[..3], Need { like: Some(&cold), ..NEED }), Err(Unplaceable::NoHost));
        // What is not known is the host's to see.
        let unknown = Like { object_store_id: "s1".into(), ..Default::default() };
        assert_eq!(chosen(&hosts[..3], Need { like: Some(&unknown), ..NEED }).unwrap(), "other-base");
    }

    #[test]
    fn the_emptier_of_two_takes_it() {
        let hosts = [(host("full"), promised(9)), (host("empty"), promised(1))];
        assert_eq!(chosen(&hosts, NEED).as_deref(), Ok("empty"));
    }

    #[test]
    fn a_waiting_clone_tips_the_balance_of_equals() {
        let warm = HostRecord { pool_ready: 1, ..host("warm") };
        let hosts = [(host("cold"), promised(2)), (warm, promised(2))];
        assert_eq!(chosen(&hosts, NEED).as_deref(), Ok("warm"));
    }

    #[test]
    fn the_refusal_names_what_is_missing() {
        assert_eq!(chosen(&[], NEED), Err(Unplaceable::NoHost));
        let full = (host("a"), promised(10));
        assert_eq!(chosen(std::slice::from_ref(&full), NEED), Err(Unplaceable::Full));
        let unknown = Need { template_id: "nope", ..NEED };
        assert_eq!(chosen(std::slice::from_ref(&full), unknown), Err(Unplaceable::NoTemplate));
        let no_disk = (HostRecord { disk_free_mb: 10, ..host("b") }, promised(0));
        assert_eq!(chosen(&[full.clone(), no_disk], NEED), Err(Unplaceable::DiskFull));
        let tried = ["a".to_owned()];
        assert_eq!(chosen(&[full], Need { avoid: &tried, ..NEED }), Err(Unplaceable::NoHost));
    }

    fn hosts() -> impl Strategy<Value = Vec<(HostRecord, Count)>> {
        let one = (0..12_i32, 0..12_000_i64, 0..3000_i64, 0..3_i32, any::<bool>());
        prop::collection::vec(one, 0..8).prop_map(|all| {
            let built = all.into_iter().enumerate().map(|(n, (sandboxes, memory_mb, disk, pool, known))| {
                let templates = if known { vec!["base".into()] } else { vec![] };
                let host =
                    HostRecord { disk_free_mb: disk, pool_ready: pool, templates, ..host(&n.to_string()) };
                (host, Count { sandboxes, memory_mb })
            });
            built.collect()
        })
    }

    proptest! {
        #[test]
        fn the_choice_fits_and_there_is_one_if_any_fits(
            hosts in hosts(),
            draws in prop::collection::vec(any::<usize>(), 2),
            avoid in prop::collection::vec((0..8).prop_map(|n: i32| n.to_string()), 0..3),
        ) {
            let candidates: Vec<_> =
                hosts.iter().map(|(host, promised)| Candidate { host, promised: *promised }).collect();
            let need = Need { avoid: &avoid, ..NEED };
            let fitting: Vec<_> = candidates
                .iter()
                .filter(|candidate| fits(&need, candidate).is_ok())
                .filter(|candidate| !avoid.contains(&candidate.host.host_id))
                .collect();
            let mut draws = draws.into_iter();
            let place = place(need, &candidates, &mut |n| draws.next().unwrap_or(0) % n);
            match place {
                Ok(host) => prop_assert!(fitting.iter().any(|fit| fit.host.host_id == host.host_id)),
                Err(_) => prop_assert!(fitting.is_empty()),
            }
        }

        #[test]
        fn it_is_never_the_worst_of_three(loads in prop::array::uniform3(0..10_i32), draws: [usize; 2]) {
            let [a, b, c] = loads;
            prop_assume!(a != b && b != c && a != c);
            let hosts: Vec<_> = loads.iter().map(|load| (host(&load.to_string()), promised(*load))).collect();
            let candidates: Vec<_> =
                hosts.iter().map(|(host, promised)| Candidate { host, promised: *promised }).collect();
            let mut draws = draws.into_iter();
            let taken = place(NEED, &candidates, &mut |n| draws.next().unwrap_or(0) % n).unwrap();
            prop_assert_ne!(&taken.host_id, &a.max(b).max(c).to_string());
        }
    }
}
