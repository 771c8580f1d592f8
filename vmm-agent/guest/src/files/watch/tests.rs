use std::{fs, path::Path, sync::Arc};

use futures_util::StreamExt as _;
use oc_proto::v1::FileEventType as What;
use tokio::sync::Semaphore;

use super::*;

async fn begin(root: &Path, is_recursive: bool) -> Stream {
    let room = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
    let mut stream = watch(root.to_owned(), is_recursive, room).await.unwrap();
    assert_eq!(next(&mut stream).await, Some((What::Unspecified, String::new(), String::new())));
    stream
}

/// The next message: type, path and old path, or nothing at the end.
async fn next(stream: &mut Stream) -> Option<(What, String, String)> {
    let next = timeout(Duration::from_secs(10), stream.next()).await.expect("nothing is told");
    next.map(|message| {
        let message = message.unwrap();
        (message.r#type(), message.path, message.renamed_from)
    })
}

/// What is told until `last` is created, sorted, with paths relative to `root`.
async fn told_until(stream: &mut Stream, root: &Path, last: &Path) -> Vec<String> {
    fs::write(last, "").unwrap();
    let relative = |path: &str| {
        Path::new(path).strip_prefix(root).map(|path| path.display().to_string()).unwrap_or_default()
    };
    let mut told = Vec::new();
    loop {
        let (what, path, from) = next(stream).await.expect("it ended");
        if what == What::Created && Path::new(&path) == last {
            return told;
        }
        let mut line = format!("{what:?} {}", relative(&path));
        if !from.is_empty() {
            line = format!("{line} from {}", relative(&from));
        }
        told.push(line);
    }
}

#[tokio::test]
async fn what_happens_in_a_directory_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let (root, outside) = (directory.path().join("root"), directory.path().join("outside"));
    fs::create_dir(&root).unwrap();
    fs::write(&outside, "").unwrap();
    fs::write(root.join("old"), "").unwrap();
    let mut stream = begin(&root, false).await;
    fs::write(root.join("old"), "new").unwrap();
    fs::rename(root.join("old"), root.join("older")).unwrap();
    fs::remove_file(root.join("older")).unwrap();
    fs::create_dir(root.join("d")).unwrap();
    fs::write(root.join("d/unseen"), "").unwrap();
    fs::rename(&outside, root.join("in")).unwrap();
    fs::hard_link(root.join("in"), root.join("linked")).unwrap();
    fs::rename(root.join("in"), &outside).unwrap();
    let told = told_until(&mut stream, &root, &root.join("last")).await;
    assert_eq!(
        told,
        [
            "Modified old",
            "Renamed older from old",
            "Removed older",
            "Created d",
            "Created in",
            "Created linked",
            "Removed in",
        ]
    );
}

#[tokio::test]
async fn a_file_that_is_moved_out_last_is_told_of_without_another_event() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("f"), "").unwrap();
    let mut stream = begin(&root, false).await;
    fs::rename(root.join("f"), directory.path().join("f")).unwrap();
    let (what, path, _) = next(&mut stream).await.unwrap();
    assert_eq!((what, Path::new(&path)), (What::Removed, root.join("f").as_path()));
}

#[tokio::test]
async fn directories_are_followed_wherever_they_go() {
    let directory = tempfile::tempdir().unwrap();
    let (root, outside) = (directory.path().join("root"), directory.path().join("outside"));
    fs::create_dir_all(root.join("a/b")).unwrap();
    let mut stream = begin(&root, true).await;
    fs::write(root.join("a/b/one"), "").unwrap();
    fs::rename(root.join("a"), root.join("z")).unwrap();
    fs::write(root.join("z/b/two"), "").unwrap();
    let told = told_until(&mut stream, &root, &root.join("1")).await;
    assert_eq!(
        told,
        ["Created a/b/one", "Modified a/b/one", "Renamed z from a", "Created z/b/two", "Modified z/b/two"]
    );
    // Moved out, it is none of the caller's business; moved in, all of it is.
    fs::rename(root.join("z"), &outside).unwrap();
    assert_eq!(told_until(&mut stream, &root, &root.join("2")).await, ["Modified 1", "Removed z"]);
    fs::write(outside.join("b/three"), "").unwrap();
    fs::rename(&outside, root.join("back")).unwrap();
    let mut told = told_until(&mut stream, &root, &root.join("3")).await;
    told.sort();
    assert_eq!(
        told,
        [
            "Created back",
            "Created back/b",
            "Created back/b/one",
            "Created back/b/three",
            "Created back/b/two",
            "Modified 2",
        ]
    );
    fs::write(root.join("back/b/four"), "").unwrap();
    let told = told_until(&mut stream, &root, &root.join("4")).await;
    assert_eq!(told, ["Modified 3", "Created back/b/four", "Modified back/b/four"]);
}

#[tokio::test]
async fn nothing_that_is_made_in_new_directories_is_missed_or_told_twice() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().to_owned();
    let mut stream = begin(&root, true).await;
    let made = root.clone();
    let maker = tokio::task::spawn_blocking(move || {
        for number in 0..200 {
            let deep = made.join(format!("{number}/x/y"));
            fs::create_dir_all(&deep).unwrap();
            fs::write(deep.join("f"), "").unwrap();
        }
    });
    let mut created = std::collections::HashMap::<String, usize>::new();
    while created.len() < 800 {
        let (what, path, _) = next(&mut stream).await.unwrap();
        if what == What::Created {
            *created.entry(path).or_default() += 1;
        }
    }
    maker.await.unwrap();
    assert!(created.values().all(|times| *times == 1));
}

#[tokio::test]
async fn links_are_followed_to_the_directory_itself_and_not_in_it() {
    let directory = tempfile::tempdir().unwrap();
    let (root, other) = (directory.path().join("root"), directory.path().join("other"));
    fs::create_dir(&root).unwrap();
    fs::create_dir(&other).unwrap();
    std::os::unix::fs::symlink(&other, root.join("away")).unwrap();
    std::os::unix::fs::symlink(&root, directory.path().join("link")).unwrap();
    let link = directory.path().join("link");
    let mut stream = begin(&link, true).await;
    std::os::unix::fs::symlink(&other, root.join("new")).unwrap();
    fs::write(other.join("f"), "").unwrap();
    assert_eq!(told_until(&mut stream, &link, &link.join("last")).await, ["Created new"]);
}

#[tokio::test]
async fn it_ends_when_the_directory_is_gone() {
    for is_moved in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        fs::create_dir_all(root.join("in")).unwrap();
        let mut stream = begin(&root, true).await;
        fs::remove_dir(root.join("in")).unwrap();
        if is_moved {
            fs::rename(&root, directory.path().join("moved")).unwrap();
        } else {
            fs::remove_dir(&root).unwrap();
        }
        let (what, path, _) = next(&mut stream).await.unwrap();
        assert_eq!((what, Path::new(&path)), (What::Removed, root.join("in").as_path()));
        assert_eq!(next(&mut stream).await, None);
    }
}

#[tokio::test]
async fn a_caller_that_misses_something_is_told_to_look_again() {
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().to_owned();
    let mut stream = begin(&root, true).await;
    // Two events each, and nobody takes them.
    for number in 0..limit {
        fs::write(root.join((number % 1000).to_string()), "").unwrap();
        fs::remove_file(root.join((number % 1000).to_string())).unwrap();
    }
    fs::create_dir(root.join("d")).unwrap();
    while next(&mut stream).await.unwrap().0 != What::Overflow {}
    // The directory that was made meanwhile is watched from then on.
    fs::write(root.join("d/f"), "").unwrap();
    let (what, path, _) = next(&mut stream).await.unwrap();
    assert_eq!((what, Path::new(&path)), (What::Created, root.join("d/f").as_path()));
}

#[tokio::test]
async fn what_cannot_be_watched_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("f"), "").unwrap();
    let room = Arc::new(Semaphore::new(2));
    for (name, reason) in [("none", "FILE_NOT_FOUND"), ("f", "NOT_A_DIRECTORY")] {
        let room = Arc::clone(&room).try_acquire_owned().unwrap();
        let refused = watch(directory.path().join(name), true, room).await.unwrap_err();
        let details = tonic_types::StatusExt::get_error_details(&refused);
        assert_eq!(details.error_info().unwrap().reason, reason);
    }
    assert_eq!(room.available_permits(), 2);
}
