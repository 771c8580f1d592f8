//! Saved devices, put into a form in which a QEMU takes them that has run before.
//!
//! A QEMU reads a migration once, at its start. One that has run takes a state only as a snapshot in a qcow2 image
//! (`snapshot-load`, qapi/migration.json), so what `xen-save-devices-state` has written is wrapped in one: a disk of one
//! cluster, which nobody looks at, and one internal snapshot, whose VM state is it (docs/interop/qcow2.txt).
//!
//! One section is left out of it: `cpu_common`. To load it makes QEMU forget all code that it has translated
//! (`cpu_common_post_load` in hw/core/cpu-system.c), which is what such a QEMU is taken for. It says whether the CPU
//! waits, and for which kinds of interrupts. The CPU that goes on without it does not wait: a guest that was idle looks
//! for work, finds none and waits again, as after any interrupt; and an interrupt that was pending is in the interrupt
//! controller's state too, which the CPU is made to look at afterwards.

/// Bytes of a cluster.
const CLUSTER: usize = 1 << CLUSTER_BITS;
const CLUSTER_BITS: u32 = 16;
/// Clusters before those of the state.
const FIRST: usize = 7;
/// Entries of a table of second level, which is one cluster: the state's clusters at most.
const ENTRIES: usize = CLUSTER / 8;
/// What the snapshot is called.
pub const TAG: &str = "state";
const ID: &str = "1";

/// Kind of a section with all of a device's state, and the mark at the end of one (migration/qemu-file-types, `savevm.h`).
const SECTION_FULL: u8 = 0x04;
const SECTION_FOOTER: u8 = 0x7e;
const CPU_COMMON: &[u8] = b"cpu_common";
/// A part of that section, there when QEMU has left the guest's code for something: its kind, and up to what follows its name.
const EXCEPTION: &[u8] = b"\x05\x1acpu_common/exception_index\0\0\0\x01";
/// From this on what QEMU has left for is its own business, such as the request to stop (`EXCP_INTERRUPT`,
/// include/exec/cpu-common.h); below it, the guest's.
const OWN_EXCEPTIONS: u32 = 0x1_0000;
/// An interrupt waits in the controller, or has to be asked for there, or QEMU is to look up from its work
/// (`CPU_INTERRUPT_HARD` and `CPU_INTERRUPT_EXITTB`, include/exec/cpu-interrupt.h; `CPU_INTERRUPT_POLL`, target/i386/cpu.h).
const INTERRUPTS: u32 = 0x0002 | 0x0004 | 0x0010;

/// Why a state cannot be taken by a QEMU that has run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// It is not laid out as this version of QEMU does it.
    #[error("the devices' state has no section of one CPU as it is expected")]
    Layout,
    /// The CPU was at something that only its whole state tells.
    #[error("the CPU was in the midst of an interrupt ({0:#x})")]
    Busy(u32),
    /// There is no room for it.
    #[error("the devices' state is too large")]
    Size,
}

/// An image whose only snapshot, called [`TAG`], is the devices' `state` of a VM with one CPU.
///
/// # Errors
///
/// [`Unfit`]: it is to be loaded into a new QEMU.
pub fn image(state: &[u8]) -> Result<Vec<u8>, Unfit> {
    wrap(&without_cpu_common(state)?)
}

fn without_cpu_common(state: &[u8]) -> Result<Vec<u8>, Unfit> {
    // The section: kind, number (4 bytes), length of the name, name, instance and version (4 each), then its fields.
    const HEAD: usize = 1 + 4 + 1 + CPU_COMMON.len() + 4 + 4;
    const FIELDS: usize = 4 + 4;
    let mut named = state.windows(HEAD).enumerate().filter(|(_, head)| {
        head[0] == SECTION_FULL
            && usize::from(head[5]) == CPU_COMMON.len()
            && head[6..].starts_with(CPU_COMMON)
    });
    let (Some((start, head)), None) = (named.next(), named.next()) else { return Err(Unfit::Layout) };
    let body = &state[start + HEAD..];
    let (fields, rest) = body.split_at_checked(FIELDS).ok_or(Unfit::Layout)?;
    let interrupts = u32::from_be_bytes([fields[4], fields[5], fields[6], fields[7]]);
    let footer = [&[SECTION_FOOTER], &head[1..5]].concat();
    if interrupts & !INTERRUPTS != 0 {
        return Err(Unfit::Busy(interrupts));
    }
    let rest = match rest.strip_prefix(EXCEPTION).and_then(<[u8]>::split_first_chunk::<4>) {
        Some((exception, _)) if u32::from_be_bytes(*exception) < OWN_EXCEPTIONS => {
            return Err(Unfit::Busy(u32::from_be_bytes(*exception)));
        }
        Some((_, rest)) => rest,
        None => rest,
    };
    let after = rest.strip_prefix(&footer[..]).ok_or(Unfit::Layout)?;
    Ok([&state[..start], after].concat())
}

fn wrap(state: &[u8]) -> Result<Vec<u8>, Unfit> {
    let clusters = state.len().div_ceil(CLUSTER);
    let (Ok(length), true) = (u32::try_from(state.len()), clusters <= ENTRIES) else {
        return Err(Unfit::Size);
    };
    // Header, table of reference counts, the counts, active table, table of snapshots, the snapshot's table, its second level.
    let at = |cluster: usize| (cluster as u64) << CLUSTER_BITS;
    let mut image = Image(vec![0; (FIRST + clusters) * CLUSTER]);
    let mut header = image.fields(0);
    header.bytes(b"QFI\xfb").u32(2);
    // No backing file; cluster size; size of the disk; no encryption.
    header.u64(0).u32(0).u32(CLUSTER_BITS).u64(CLUSTER as u64).u32(0);
    // Active table: entries and place. Reference counts: place and clusters. Snapshots: how many, and place.
    header.u32(1).u64(at(3)).u64(at(1)).u32(1).u32(1).u64(at(4));
    image.fields(1).u64(at(2));
    let mut counts = image.fields(2);
    for _ in 0..FIRST + clusters {
        counts.u16(1);
    }
    // The state begins where the disk ends: behind the first entry.
    let mut snapshot = image.fields(4);
    snapshot.u64(at(5)).u32(2);
    // Lengths of ID and name, no dates, no clock, sizes of state and of what follows: size of the state again and of the disk.
    snapshot.u16(ID.len() as u16).u16(TAG.len() as u16).u32(0).u32(0).u64(0).u32(length).u32(16);
    snapshot.u64(u64::from(length)).u64(CLUSTER as u64).bytes(ID.as_bytes()).bytes(TAG.as_bytes());
    image.fields(5).u64(0).u64(at(6));
    let mut second = image.fields(6);
    for cluster in 0..clusters {
        second.u64(at(FIRST + cluster));
    }
    image.0[FIRST * CLUSTER..][..state.len()].copy_from_slice(state);
    Ok(image.0)
}

struct Image(Vec<u8>);

impl Image {
    /// The fields that begin with a cluster.
    fn fields(&mut self, cluster: usize) -> Fields<'_> {
        Fields { rest: &mut self.0[cluster * CLUSTER..] }
    }
}

/// Fields one after the other, the first byte of a number its highest. All that are written fit into a cluster.
struct Fields<'a> {
    rest: &'a mut [u8],
}

impl Fields<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        let (field, rest) = std::mem::take(&mut self.rest).split_at_mut(bytes.len());
        field.copy_from_slice(bytes);
        self.rest = rest;
        self
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A state with one section of a CPU, as QEMU writes it, between two others.
    fn state(number: u32, interrupts: u32, more: &[u8]) -> Vec<u8> {
        let footer = [&[SECTION_FOOTER][..], &number.to_be_bytes()].concat();
        let mut section = [&[SECTION_FULL][..], &number.to_be_bytes(), &[10], CPU_COMMON].concat();
        for field in [0, 1, 1, interrupts] {
            section.extend_from_slice(&u32::to_be_bytes(field));
        }
        [b"before", &section[..], more, &footer, b"after"].concat()
    }

    #[test]
    fn the_section_of_the_cpu_is_left_out() {
        assert_eq!(without_cpu_common(&state(7, 0, b"")).unwrap(), b"beforeafter");
        assert_eq!(without_cpu_common(&state(7, INTERRUPTS, b"")).unwrap(), b"beforeafter");
        assert_eq!(without_cpu_common(&state(7, 0x100, b"")), Err(Unfit::Busy(0x100)));
        let exception = |number: u32| [EXCEPTION, &number.to_be_bytes()].concat();
        assert_eq!(without_cpu_common(&state(7, 0, &exception(0x1_0003))).unwrap(), b"beforeafter");
        assert_eq!(without_cpu_common(&state(7, 0, &exception(14))), Err(Unfit::Busy(14)));
        assert_eq!(without_cpu_common(&state(7, 0, b"\x05\x04more")), Err(Unfit::Layout));
        assert_eq!(without_cpu_common(b"none"), Err(Unfit::Layout));
        let two = [state(7, 0, b""), state(8, 0, b"")].concat();
        assert_eq!(without_cpu_common(&two), Err(Unfit::Layout), "two CPUs");
        let short = state(7, 0, b"");
        for length in 0..short.len() - b"\x7e....after".len() {
            assert!(without_cpu_common(&short[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn what_is_wrapped_is_there_and_there_is_an_end_to_it() {
        let state = [vec![1; CLUSTER], vec![2; 5]].concat();
        let image = wrap(&state).unwrap();
        assert_eq!(image.len(), (FIRST + 2) * CLUSTER);
        assert!(image.starts_with(b"QFI\xfb"));
        assert_eq!(&image[FIRST * CLUSTER..][..state.len()], state);
        assert_eq!(wrap(&vec![0; (ENTRIES + 1) * CLUSTER]), Err(Unfit::Size));
    }
}
