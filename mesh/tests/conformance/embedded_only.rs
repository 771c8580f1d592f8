//! What only the store in a file has: several processes on it, crashes, and the file itself.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use futures_util::StreamExt as _;
use oc_mesh::store::{Revision, SharedStore, StoreError, open};
use tokio::{task::JoinSet, time::timeout};

use super::{
    child::Process,
    fixture::{Fixture, next, put, within},
};

async fn open_file(file: &Path) -> Result<SharedStore, StoreError> {
    open(&format!("file://{}", file.display())).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_opens_in_one_process_see_each_other() {
    let fixture = Fixture::embedded().await;
    let other = fixture.open_again().await;
    let mut here = fixture.store.watch("k/", Revision(0)).await.unwrap();
    let mut there = other.watch("k/", Revision(0)).await.unwrap();
    for round in 0..20 {
        let store = if round % 2 == 0 { &fixture.store } else { &other };
        let revision = put(store, "k/1", &round.to_string()).await;
        assert_eq!(next(&mut here).await.unwrap()[0].2, revision);
        assert_eq!(next(&mut there).await.unwrap()[0].2, revision);
    }
    // Closing one takes no locks from the other.
    drop(there);
    drop(other);
    let revision = fixture.put("k/1", "after").await;
    assert_eq!(next(&mut here).await.unwrap()[0].2, revision);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_ends_when_its_store_is_closed() {
    let fixture = Fixture::embedded().await;
    let mut watch = fixture.store.watch("k/", Revision(0)).await.unwrap();
    let waiting = tokio::spawn(async move { next(&mut watch).await });
    drop(fixture.store);
    let ended = within("the watch to end", waiting).await.unwrap();
    assert!(matches!(ended, Err(StoreError::Unavailable(_))), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_see_each_other() {
    let fixture = Fixture::embedded().await;
    let mut child = Process::start("answer", &fixture.file());
    assert_eq!(child.line().as_deref(), Some("ready"));
    assert_eq!(child.line().as_deref(), Some("watching"));
    let mut watch = fixture.store.watch("pong/", Revision(0)).await.unwrap();
    // All rounds in the time of one: they are not found by polling, which would take them minutes.
    within("the rounds", async {
        for round in 0..100 {
            let round = round.to_string();
            fixture.put("ping/1", &round).await;
            let item = next(&mut watch).await.unwrap();
            assert_eq!(item[0].1.as_deref(), Some(round.as_str()));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_processes_open_a_new_file_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("store.db");
    let mut children: Vec<Process> = (0..6).map(|_| Process::start("open", &file)).collect();
    for child in &mut children {
        assert_eq!(child.line().as_deref(), Some("ready"));
        assert_eq!(child.line().as_deref(), Some("done"));
    }
    let store = open_file(&file).await.unwrap();
    assert_eq!(store.range("opened/", None, 100).await.unwrap().items.len(), 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_writer_loses_nothing_that_was_acknowledged() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("store.db");
    let mut acknowledged = HashSet::new();
    // The last round has nobody else on the file: the next open recovers it.
    for witness in [true, true, false, false] {
        let other = if witness { Some(open_file(&file).await.unwrap()) } else { None };
        let mut child = Process::start("write", &file);
        assert_eq!(child.line().as_deref(), Some("ready"));
        for _ in 0..100 {
            acknowledged.insert(child.line().unwrap());
        }
        child.kill();
        while let Some(key) = child.line() {
            acknowledged.insert(key);
        }
        drop(other);

        let store = open_file(&file).await.unwrap();
        let mut found = HashSet::new();
        let mut newest = Revision(0);
        let mut after = None;
        loop {
            let page = store.range("written/", after.as_deref(), 1000).await.unwrap();
            newest = page.items.iter().map(|entry| entry.mod_revision).max().unwrap_or(newest).max(newest);
            assert!(newest <= page.revision, "no key is newer than the store");
            after = page.items.last().map(|entry| entry.key.clone());
            found.extend(page.items.into_iter().map(|entry| entry.key));
            if !page.more {
                break;
            }
        }
        assert!(acknowledged.is_subset(&found));
        // History and keys agree: following from the beginning ends with the same keys.
        let mut watch = store.watch("written/", Revision(0)).await.unwrap();
        let mut replayed = HashSet::new();
        let mut last = Revision(0);
        while last < newest {
            for (key, _, revision) in next(&mut watch).await.unwrap() {
                replayed.insert(key);
                last = revision;
            }
        }
        assert_eq!(replayed, found);
        put(&store, "alive", "").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_members_keys_lapse_for_the_others() {
    let fixture = Fixture::embedded().await;
    let mut child = Process::start("member", &fixture.file());
    assert_eq!(child.line().as_deref(), Some("ready"));
    assert_eq!(child.line().as_deref(), Some("member"));
    assert!(fixture.get("member/child").await.is_some());
    let start = fixture.revision().await;
    let mut watch = fixture.store.watch("member/", start).await.unwrap();
    child.kill();
    assert_eq!(next(&mut watch).await.unwrap()[0].1, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_process_burns_no_cpu() {
    /// Ticks of 10 ms, the unit of `/proc/*/stat` on every Linux.
    fn ticks(process: u32) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        // User and system time, fields 14 and 15 of proc(5).
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }
    let fixture = Fixture::embedded().await;
    let mut child = Process::start("idle", &fixture.file());
    assert_eq!(child.line().as_deref(), Some("ready"));
    let mut used = Vec::new();
    // What it does before it is idle may come late, and fall into the first of these times.
    while used.len() < 3 && used.iter().all(|ticks| *ticks > 5) {
        let before = ticks(child.id());
        tokio::time::sleep(Duration::from_secs(2)).await;
        used.push(ticks(child.id()) - before);
    }
    assert!(used.iter().any(|ticks| *ticks <= 5), "{used:?} ticks, each in two idle seconds");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_readers_at_once_share_few_files() {
    let fixture = Fixture::embedded().await;
    fixture.put("key", "value").await;
    let open_files = || {
        let files = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let home = fixture.file().parent().unwrap().to_owned();
        files.filter(|file| fs::read_link(file.path()).is_ok_and(|target| target.starts_with(&home))).count()
    };
    let mut readers = JoinSet::new();
    for _ in 0..1000 {
        let store = Arc::clone(&fixture.store);
        readers.spawn(async move { store.get("key").await.unwrap().unwrap() });
    }
    let mut most = 0;
    while within("the readers", readers.join_next()).await.is_some() {
        most = most.max(open_files());
    }
    assert!(most <= 20, "{most} files open");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_stays_short_amid_readers_that_overlap() {
    const LONG: u64 = 40 << 20;
    // Far more readers than processors: each attempt at a short log needs all of them to have run within a moment.
    const PATIENCE: Duration = Duration::from_secs(120);
    let fixture = Fixture::embedded().await;
    let mut stores = vec![Arc::clone(&fixture.store)];
    for _ in 0..2 {
        stores.push(fixture.open_again().await);
    }
    let value = "x".repeat(32 << 10);
    for key in 0..100 {
        fixture.put(&format!("k/{key}"), &value).await;
    }
    let mut readers = JoinSet::new();
    for store in stores.iter().cycle().take(12) {
        let store = Arc::clone(store);
        readers.spawn(async move {
            while !store.range("k/", None, 100).await.unwrap().items.is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
    }
    let length = || fs::metadata(fixture.file().with_extension("db-wal")).unwrap().len();
    let writes = (0..2000).map(|write| {
        let (fixture, value) = (&fixture, &value);
        async move { fixture.put(&format!("k/{}", write % 100), value).await }
    });
    let mut writes = futures_util::stream::iter(writes).buffer_unordered(8);
    let mut longest = 0;
    timeout(PATIENCE, async {
        while writes.next().await.is_some() {
            longest = length().max(longest);
        }
    })
    .await
    .expect("the writes end");
    assert!(longest > 4 << 20, "the log is what is looked at: {longest} bytes");
    timeout(PATIENCE, async {
        while length() > LONG {
            fixture.put("k/0", &value).await;
        }
    })
    .await
    .expect("the log is short again");
    readers.abort_all();
}

#[tokio::test]
async fn only_the_owner_may_read_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("store.db");
    let mode = |name: &str| {
        let metadata = fs::metadata(directory.path().join(name)).unwrap();
        metadata.permissions().mode() & 0o777
    };
    let store = open_file(&file).await.unwrap();
    for name in ["store.db", "store.db-wal", "store.db-shm"] {
        assert_eq!(mode(name), 0o600, "{name}");
    }
    drop(store);
    // A file that came with other permissions loses them.
    let file = directory.path().join("loose.db");
    fs::write(&file, "").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
    let _store = open_file(&file).await.unwrap();
    for name in ["loose.db", "loose.db-wal", "loose.db-shm"] {
        assert_eq!(mode(name), 0o600, "{name}");
    }
}

#[tokio::test]
async fn an_empty_file_is_a_fresh_store() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("store.db");
    fs::write(&file, "").unwrap();
    let store = open_file(&file).await.unwrap();
    put(&store, "key", "value").await;
    assert!(store.get("key").await.unwrap().is_some());
}

#[tokio::test]
async fn a_corrupt_file_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("store.db");
    fs::write(&file, "this is no database ".repeat(1000)).unwrap();
    let opened = open_file(&file).await;
    assert!(matches!(opened, Err(StoreError::Corrupt(_))), "{opened:?}");

    // One that was good once: every page but the first is overwritten.
    let file = directory.path().join("once.db");
    let store = open_file(&file).await.unwrap();
    for number in 0..100 {
        put(&store, &format!("key/{number}"), &"x".repeat(1000)).await;
    }
    drop(store);
    // All of it into the one file.
    let connection = rusqlite::Connection::open(&file).unwrap();
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    drop(connection);
    let length = fs::metadata(&file).unwrap().len();
    let rest = vec![0xa5; usize::try_from(length - 4096).unwrap()];
    fs::OpenOptions::new().write(true).open(&file).unwrap().write_all_at(&rest, 4096).unwrap();
    let result = match open_file(&file).await {
        Ok(store) => store.range("key/", None, 100).await.map(|_| ()),
        Err(error) => Err(error),
    };
    assert!(matches!(result, Err(StoreError::Corrupt(_))), "{result:?}");

    assert!(matches!(open("file://relative").await, Err(StoreError::Invalid(_))));
    let nowhere = open_file(&directory.path().join("none/store.db")).await;
    assert!(matches!(nowhere, Err(StoreError::Unavailable(_))), "{nowhere:?}");
}
