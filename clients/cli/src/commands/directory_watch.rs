//! `oc files watch`: a line for everything that happens in a directory of a sandbox.

use std::time::Duration;

use oc_proto::v1::{FileEventType, WatchDirectoryRequest, WatchDirectoryResponse};
use tokio::time::timeout;
use tonic::Request;

use crate::{
    commands::remote_path::InSandbox,
    connection::Connection,
    failure::Failure,
    json,
    output::{self, Output, Printable},
};

/// For the watch to begin; a hibernated sandbox wakes meanwhile.
const OPENING: Duration = Duration::from_secs(60);

/// Prints what happens until the directory itself is gone. A stream that breaks is an error: what happened then is not
/// known, and whoever watches must look again.
pub async fn run(
    connection: &Connection,
    place: &InSandbox,
    recursive: bool,
    output: Output,
) -> Result<(), Failure> {
    let request =
        WatchDirectoryRequest { sandbox_id: place.id.clone(), path: place.path_or_home(), recursive };
    let mut client = connection.files();
    let begun = timeout(OPENING, async {
        let mut events = client.watch_directory(Request::new(request)).await?.into_inner();
        // The first message says only that nothing is missed from now on.
        events.message().await?;
        Ok::<_, Failure>(events)
    });
    let mut events = match begun.await {
        Ok(events) => events?,
        Err(_) => return Err(Failure::Stalled("the watch did not begin in time".to_owned())),
    };
    output::note(format_args!("oc: watching {}:{}", place.id, place.path));
    while let Some(event) = events.message().await? {
        output.line(&if output.is_json() { json::of(&event).to_string() } else { text(&event) })?;
    }
    output::note("oc: the directory is gone");
    Ok(())
}

/// `created   /home/sandbox/file`; a directory's path ends with a slash.
fn text(event: &WatchDirectoryResponse) -> String {
    let slash = if event.is_dir { "/" } else { "" };
    let path = format!("{}{slash}", event.path);
    let (word, what) = match event.r#type() {
        FileEventType::Unspecified => ("other", path),
        FileEventType::Created => ("created", path),
        FileEventType::Modified => ("modified", path),
        FileEventType::Removed => ("removed", path),
        FileEventType::Renamed => ("renamed", format!("{} -> {path}", event.renamed_from)),
        FileEventType::Overflow => ("overflow", "more happened than can be told: look again".to_owned()),
    };
    let line = format!("{word:9} {what}");
    Printable(&line).to_string().replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_happened_to_what() {
        let mut event =
            WatchDirectoryResponse { path: "/d/a\nb".into(), ..WatchDirectoryResponse::default() };
        event.set_type(FileEventType::Created);
        assert_eq!(text(&event), "created   /d/a\\nb");
        event = WatchDirectoryResponse {
            path: "/d/new".into(),
            renamed_from: "/d/old".into(),
            is_dir: true,
            ..event
        };
        event.set_type(FileEventType::Renamed);
        assert_eq!(text(&event), "renamed   /d/old -> /d/new/");
    }
}
