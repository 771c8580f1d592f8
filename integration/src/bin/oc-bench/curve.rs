//! How checkpoints and hibernation grow with what a sandbox has changed in its memory since the checkpoint before.

use std::{collections::VecDeque, fmt};

use oc_integration::{
    mesh::Mesh,
    rest::{Rest, Sandbox},
};
use tokio::time::sleep;

use crate::{
    table::{median, number},
    timed::{REST, Taken, change_memory, checkpoint, checkpoints_of, delete, hibernate, rested, wake},
};

const SMALL_MB: u64 = 512;
const LARGE_MB: u64 = 2048;
/// Memory of the guest, and how much of it is changed, MiB.
const POINTS: [(u64, u64); 5] =
    [(SMALL_MB, 0), (SMALL_MB, 16), (SMALL_MB, 64), (LARGE_MB, 256), (LARGE_MB, 1024)];
const RUNS: usize = 5;
/// Of [`LARGE_MB`].
const LARGE_RUNS: usize = 3;
const CHAIN: usize = 20;
const LINK_MIB: u64 = 16;
/// A sandbox has at most so many full ones.
const KEPT: usize = 10;
/// Room for the largest sandbox's states several times over, MiB.
const DATA_IMAGE_MB: &str = "16384";

/// Checkpoints and hibernation by what was changed, and a chain of checkpoints.
#[derive(Debug, Default)]
pub struct Curve {
    /// Whether it was measured where copies share their blocks.
    shares_blocks: bool,
    points: Vec<Point>,
    chain: Vec<Taken>,
}

#[derive(Debug)]
struct Point {
    memory_mb: u64,
    changed_mib: u64,
    taken: Taken,
    hibernate_ms: f64,
    wake_ms: f64,
}

/// Measures.
pub async fn measure() -> anyhow::Result<Curve> {
    let options = ["--pool-size", "0", "--paused-for", "0", "--data-image-mb", DATA_IMAGE_MB];
    let on_image = Mesh::start(&options);
    let mut curve = Curve { shares_blocks: on_image.is_ok(), ..Curve::default() };
    let mesh = match on_image {
        Ok(mesh) => mesh,
        Err(error) => {
            eprintln!("the host's own filesystem is measured: {error:#}");
            Mesh::start(&["--pool-size", "0", "--paused-for", "0"])?
        }
    };
    let rest = mesh.rest();
    for (memory_mb, changed_mib) in POINTS {
        let sandbox = roomy(&rest, memory_mb).await?;
        let runs = if memory_mb == LARGE_MB { LARGE_RUNS } else { RUNS };
        let taken = checkpoints_of(&rest, &sandbox, changed_mib, runs).await?;
        let (mut hibernated, mut woken) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            // What a woken one has not changed since, it has in common with what was stored.
            change_memory(&sandbox, "changed", changed_mib).await?;
            sleep(REST).await;
            hibernated.push(hibernate(&rest, &sandbox).await?);
            sleep(REST).await;
            woken.push(wake(&sandbox, "memory").await?);
        }
        let (hibernate_ms, wake_ms) = (median(&hibernated), median(&woken));
        let point = Point { memory_mb, changed_mib, taken, hibernate_ms, wake_ms };
        eprintln!("{point:?}");
        curve.points.push(point);
        sandbox.delete().await?;
    }
    curve.chain = chain(&rest).await?;
    mesh.stop()?;
    Ok(curve)
}

/// Checkpoints of one sandbox, each after it has changed memory that it had not changed before.
async fn chain(rest: &Rest) -> anyhow::Result<Vec<Taken>> {
    let sandbox = roomy(rest, LARGE_MB).await?;
    let (mut chain, mut kept) = (Vec::new(), VecDeque::<String>::new());
    for number in 0..CHAIN {
        let name = format!("link-{number}");
        change_memory(&sandbox, &name, LINK_MIB).await?;
        if kept.len() == KEPT
            && let Some(oldest) = kept.pop_front()
        {
            delete(rest, &oldest).await?;
        }
        sleep(REST).await;
        let (id, taken) = checkpoint(rest, &sandbox, &name).await?;
        eprintln!("{name}: {taken:?}");
        kept.push_back(id);
        chain.push(taken);
    }
    for id in kept {
        delete(rest, &id).await?;
    }
    sandbox.delete().await?;
    Ok(chain)
}

/// A sandbox at rest with room for files in most of its memory.
async fn roomy(rest: &Rest, memory_mb: u64) -> anyhow::Result<Sandbox> {
    let sandbox = rested(rest, memory_mb).await?;
    sandbox.run_as_root("mount -o remount,size=90% /dev/shm").await?;
    Ok(sandbox)
}

impl fmt::Display for Curve {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.shares_blocks {
            true => "an XFS of its own (`--data-image-mb`)",
            false => "the host's filesystem, as there is no room, XFS or loop device for another",
        };
        writeln!(formatter, "Data directory on {place}. Changed since the checkpoint before:\n")?;
        writeln!(
            formatter,
            "| changed in the guest | by the host's count | guest | checkpoint: call | its pause | hibernate | \
             command while hibernated → output |\n| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
        )?;
        for Point { memory_mb, changed_mib, taken, hibernate_ms, wake_ms } in &self.points {
            writeln!(
                formatter,
                "| {changed_mib} MiB | {} MiB | {memory_mb} MiB | {} ms | {} ms | {} ms | {} ms |",
                number(taken.changed_mib),
                number(taken.call_ms),
                number(taken.pause_ms),
                number(*hibernate_ms),
                number(*wake_ms)
            )?;
        }
        writeln!(
            formatter,
            "\n| {CHAIN} checkpoints, {LINK_MIB} MiB more changed before each | by the host's count | call | \
             its pause |\n| ---: | ---: | ---: | ---: |"
        )?;
        for at in [0, CHAIN / 2 - 1, CHAIN - 1] {
            let Some(taken) = self.chain.get(at) else { continue };
            writeln!(
                formatter,
                "| {} | {} MiB | {} ms | {} ms |",
                at + 1,
                number(taken.changed_mib),
                number(taken.call_ms),
                number(taken.pause_ms)
            )?;
        }
        Ok(())
    }
}
