//! The memory of a VM that is restored on huge pages.
//!
//! Firecracker maps no file on huge pages. It makes an empty memory instead, and has a process answer for each page that is
//! touched first, by userfaultfd(2) (docs/hugepages.md, docs/snapshotting/handling-page-faults-on-snapshot-resume.md). Should that
//! process die, the VM hangs for ever. So all of the memory is filled at once, while the VMM loads its devices, and the kernel is
//! told to ask nobody any more: from then on the VM depends on nobody. An agent that dies meanwhile has not started the guest.
//!
//! Blocks that are all zero are left out: the kernel gives the guest pages of that kind by itself.

use std::{fs::File, io, os::fd::OwnedFd, path::PathBuf, time::Duration};

use oc_mesh::handoff;
use serde::Deserialize;
use tokio::{net::UnixListener, task::spawn_blocking, time::timeout};

use super::jail::Jail;
use crate::driver::userfaultfd::{self, Range};

/// Where a VMM asks, in its jail.
pub const SOCKET: &str = "pages.sock";
/// A huge page, bytes: what Firecracker offers of the sizes of x86-64.
pub const HUGE_PAGE: u64 = 2 << 20;
/// A VMM asks as soon as it loads a snapshot.
const ASKS_WITHIN: Duration = Duration::from_secs(20);
/// Bytes of what it says: a few numbers for each of its regions.
const MAX_MESSAGE: usize = 16 << 10;
/// Regions of a guest's memory: below and above the gap for devices.
const MAX_REGIONS: usize = 8;

/// A part of the guest's memory (`GuestRegionUffdMapping` in src/vmm/src/persist.rs).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
struct Region {
    /// Where the VMM has it.
    base_host_virt_addr: u64,
    /// Bytes.
    size: u64,
    /// Where it is in the image.
    offset: u64,
}

/// Fills the memory of one VM.
#[derive(Debug)]
pub struct Filler {
    listener: UnixListener,
    jail: Jail,
    image: PathBuf,
}

impl Filler {
    /// Waits in `jail` for a VMM that wants what is in `image`.
    ///
    /// # Errors
    ///
    /// If it cannot be waited for there.
    pub fn listen(jail: Jail, image: PathBuf) -> io::Result<Self> {
        Ok(Self { listener: jail.listen(SOCKET)?, jail, image })
    }

    /// Fills it, once.
    ///
    /// # Errors
    ///
    /// If the VMM does not ask, or has no memory that the image fits in; `OutOfMemory` if the host has no huge pages left.
    pub async fn fill(self) -> io::Result<()> {
        let asked = async {
            let (stream, _) = self.listener.accept().await?;
            if stream.peer_cred()?.uid() != self.jail.uid() {
                return Err(io::Error::from(io::ErrorKind::PermissionDenied));
            }
            let mut message = vec![0; MAX_MESSAGE];
            let (length, descriptor) = handoff::receive(&stream, &mut message).await?;
            message.truncate(length);
            Ok((message, descriptor))
        };
        let (message, descriptor) = timeout(ASKS_WITHIN, asked).await??;
        let image = self.image;
        let filled = spawn_blocking(move || {
            let image = File::open(image)?;
            let regions = regions(&message, image.metadata()?.len())?;
            fill(&descriptor, &image, &regions)
        });
        filled.await.map_err(io::Error::other)?.map_err(|error| match error.kind() {
            io::ErrorKind::OutOfMemory => io::Error::new(
                error.kind(),
                "the host has no huge pages left: raise vm.nr_hugepages, or run fewer sandboxes",
            ),
            _ => error,
        })
    }
}

/// Reads where the VMM has its memory, all of which is in an image of so many bytes.
fn regions(message: &[u8], image_bytes: u64) -> io::Result<Vec<Region>> {
    let regions: Vec<Region> = serde_json::from_slice(message)?;
    let fits = |region: &Region| {
        let numbers = [region.base_host_virt_addr, region.size, region.offset];
        let end = region.offset.checked_add(region.size);
        numbers.iter().all(|number| number % HUGE_PAGE == 0) && end.is_some_and(|end| end <= image_bytes)
    };
    let whole: u64 = regions.iter().map(|region| region.size).fold(0, u64::saturating_add);
    if regions.len() > MAX_REGIONS || !regions.iter().all(fits) || whole != image_bytes {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the VMM's memory is not that of the image"));
    }
    Ok(regions)
}

fn fill(descriptor: &OwnedFd, image: &File, regions: &[Region]) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    userfaultfd::check(descriptor)?;
    let mut block = vec![0; usize::try_from(HUGE_PAGE).map_err(io::Error::other)?];
    for region in regions {
        for start in (0..region.size).step_by(block.len()) {
            image.read_exact_at(&mut block, region.offset + start)?;
            if block.chunks(4096).any(|page| page != [0; 4096]) {
                userfaultfd::copy(descriptor, region.base_host_virt_addr + start, &block)?;
            }
        }
    }
    for region in regions {
        let range = Range { start: region.base_host_virt_addr, len: region.size };
        userfaultfd::unregister(descriptor, range)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_a_memory_that_is_as_large_as_its_image_is_filled() {
        let region = |base: u64, size: u64, offset: u64| {
            // As it is said, with fields that are of no use here.
            json!({ "base_host_virt_addr": base, "size": size, "offset": offset, "page_size": HUGE_PAGE, "page_size_kib": HUGE_PAGE })
        };
        let read = |all: Vec<serde_json::Value>, bytes| regions(json!(all).to_string().as_bytes(), bytes);
        let huge = HUGE_PAGE;
        let two = read(vec![region(huge, huge, 0), region(9 * huge, 2 * huge, huge)], 3 * huge).unwrap();
        assert_eq!((two.len(), two[1].offset), (2, huge));
        for (bad, bytes) in [
            (vec![region(huge, huge, 0)], 2 * huge),
            (vec![region(huge, 2 * huge, 0)], huge),
            (vec![region(huge, huge, huge)], huge),
            (vec![region(huge + 4096, huge, 0)], huge),
            (vec![region(huge, huge, u64::MAX - huge + 1)], huge),
            (vec![region(0, 0, 0); 9], 0),
            (vec![json!({ "size": huge })], huge),
        ] {
            assert_eq!(read(bad.clone(), bytes).unwrap_err().kind(), io::ErrorKind::InvalidData, "{bad:?}");
        }
        assert!(regions(b"[", 0).is_err());
    }

    #[test]
    fn only_a_userfaultfd_is_written_by() {
        let other = OwnedFd::from(File::open("/dev/null").unwrap());
        assert!(fill(&other, &tempfile::tempfile().unwrap(), &[]).is_err());
    }
}
