//! Where a file lies on its disk, by the ioctl `FS_IOC_FIEMAP` (Documentation/filesystems/fiemap.rst): what two files have in
//! the same place is the same, and need not be read to know it.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
};

use super::{
    pages::{PAGE, Run},
    runs,
};

// include/uapi/linux/fiemap.h
const FIEMAP_FLAG_SYNC: u32 = 1;
const FIEMAP_EXTENT_LAST: u32 = 0x1;
const FIEMAP_EXTENT_MERGED: u32 = 0x1000;
const FIEMAP_EXTENT_SHARED: u32 = 0x2000;
/// Bytes that are compared at a time.
const PIECE: u64 = 1 << 20;
/// Extents that are told at a time.
const AT_A_TIME: usize = 512;

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap`.
#[repr(C)]
#[derive(Debug)]
pub struct Request {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [RawExtent; AT_A_TIME],
}

/// Bytes of a `struct fiemap` without extents, of which the number of the ioctl is made.
const HEADER: usize = 32;

nix::ioctl_readwrite_bad! {
    /// `FS_IOC_FIEMAP`.
    fiemap, nix::request_code_readwrite!(b'f', 11, HEADER), Request
}

/// A part of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its bytes.
    pub range: Range<u64>,
    /// Where it begins on the disk; `None` if that says nothing about what is in it.
    place: Option<u64>,
}

/// The parts of `file` that are no holes, in order.
///
/// # Errors
///
/// If its filesystem does not tell.
pub fn of(file: &File) -> io::Result<Vec<Extent>> {
    let mut found: Vec<Extent> = Vec::new();
    let mut at = 0;
    loop {
        let mut asked = Request {
            start: at,
            length: u64::MAX - at,
            flags: FIEMAP_FLAG_SYNC,
            mapped_extents: 0,
            extent_count: AT_A_TIME as u32,
            reserved: 0,
            extents: [RawExtent::default(); AT_A_TIME],
        };
        // SAFETY: the kernel reads and writes `asked`, which has room for the extents that it says it has.
        unsafe { fiemap(file.as_raw_fd(), &mut asked) }?;
        let told = asked.extents.get(..asked.mapped_extents as usize).unwrap_or_default();
        for raw in told {
            let plain = FIEMAP_EXTENT_LAST | FIEMAP_EXTENT_MERGED | FIEMAP_EXTENT_SHARED;
            // What is not written yet, packed or elsewhere has no place of its own.
            let place = (raw.flags & !plain == 0).then_some(raw.physical);
            found.push(Extent { range: raw.logical..raw.logical + raw.length, place });
        }
        match told.last() {
            Some(last) if last.flags & FIEMAP_EXTENT_LAST == 0 && last.logical + last.length > at => {
                at = last.logical + last.length;
            }
            _ => return Ok(found),
        }
    }
}

/// The ranges in which both files have the same, holes included, up to `end`: in order, and as long as they can be.
pub fn alike(one: &[Extent], other: &[Extent], end: u64) -> Vec<Range<u64>> {
    let edges = |extents: &[Extent]| -> Vec<u64> {
        extents.iter().flat_map(|extent| [extent.range.start, extent.range.end]).collect()
    };
    let mut cuts = [edges(one), edges(other), vec![0, end]].concat();
    cuts.retain(|cut| *cut <= end);
    cuts.sort_unstable();
    cuts.dedup();
    let (mut one, mut other) = (one.iter().peekable(), other.iter().peekable());
    let mut alike: Vec<Range<u64>> = Vec::new();
    for (from, to) in cuts.iter().zip(cuts.iter().skip(1)) {
        if place_at(&mut one, *from) != place_at(&mut other, *from) {
            continue;
        }
        // Nothing to go by in one of them.
        if one.peek().is_some_and(|extent| extent.range.contains(from) && extent.place.is_none()) {
            continue;
        }
        match alike.last_mut() {
            Some(last) if last.end == *from => last.end = *to,
            _ => alike.push(*from..*to),
        }
    }
    alike
}

/// The pages of `file` that are not as in `before`, which is as long; without one, those that are not zero. What lies in the
/// same place is not read.
///
/// # Errors
///
/// If either cannot be read.
pub fn differing(before: Option<&File>, file: &File) -> io::Result<Vec<Run>> {
    let end = file.metadata()?.len();
    let same = match before {
        Some(before) => of(before).and_then(|before| Ok(alike(&before, &of(file)?, end))),
        None => of(file).map(|extents| alike(&[], &extents, end)),
    };
    // A filesystem that does not tell: all of it is read.
    let same = same.unwrap_or_default();
    let starts = same.iter().map(|range| range.end).chain([end]);
    let unlike = std::iter::once(0).chain(starts).zip(same.iter().map(|range| range.start).chain([end, end]));
    let (mut ours, mut theirs) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
    let mut runs = Vec::new();
    for (from, to) in unlike.map(|(from, to)| (from / PAGE * PAGE, to.div_ceil(PAGE) * PAGE)) {
        for at in (from..to.min(end)).step_by(PIECE as usize) {
            let length = (to.min(end) - at).min(PIECE) as usize;
            let (ours, theirs) = (&mut ours[..length], &mut theirs[..length]);
            file.read_exact_at(ours, at)?;
            if let Some(before) = before {
                before.read_exact_at(theirs, at)?;
            }
            let pages = (at / PAGE..).zip(ours.chunks(PAGE as usize).zip(theirs.chunks(PAGE as usize)));
            let differ = pages.filter(|(_, (ours, theirs))| ours != theirs);
            runs.extend(differ.map(|(page, _)| Run(u32::try_from(page).unwrap_or(u32::MAX), 1)));
        }
    }
    Ok(runs::settled(runs))
}

/// Where the byte `at` lies: in a hole, or there.
fn place_at<'a>(
    extents: &mut std::iter::Peekable<impl Iterator<Item = &'a Extent>>,
    at: u64,
) -> Option<Option<u64>> {
    while extents.next_if(|extent| extent.range.end <= at).is_some() {}
    let extent = extents.peek().filter(|extent| extent.range.contains(&at))?;
    Some(extent.place.map(|place| place + (at - extent.range.start)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(range: Range<u64>, place: Option<u64>) -> Extent {
        Extent { range, place }
    }

    #[test]
    fn what_lies_in_the_same_place_is_alike_and_so_are_holes() {
        let one = [extent(0..10, Some(100)), extent(20..40, Some(200)), extent(60..70, None)];
        assert_eq!(alike(&one, &one, 100), [0..60, 70..100]);
        // Cut elsewhere, with something else in between, and more at the end.
        let other = [
            extent(0..5, Some(100)),
            extent(5..10, Some(105)),
            extent(20..30, Some(200)),
            extent(30..35, Some(900)),
            extent(35..40, Some(215)),
            extent(60..70, None),
            extent(90..95, Some(300)),
        ];
        assert_eq!(alike(&one, &other, 100), [0..30, 35..60, 70..90, 95..100]);
        assert_eq!(alike(&one, &[], 65), [10..20, 40..60]);
        assert_eq!(alike(&[], &[], 7), vec![0..7]);
    }

    #[test]
    fn pages_differ_or_not_wherever_they_lie() {
        let page = |file: &File, number: u64, byte: u8| {
            file.write_all_at(&vec![byte; PAGE as usize], number * PAGE).unwrap();
        };
        // One filesystem that tells where data lies, and one that does not.
        for dir in ["/var/tmp", "/dev/shm"] {
            let (before, file) = (tempfile::tempfile_in(dir).unwrap(), tempfile::tempfile_in(dir).unwrap());
            for file in [&before, &file] {
                file.set_len(4096 * PAGE).unwrap();
                for number in [3, 700, 701] {
                    page(file, number, 7);
                }
            }
            assert_eq!(differing(Some(&before), &file).unwrap(), [], "{dir}");
            for (number, byte) in [(0, 1), (700, 9), (3000, 2), (4095, 3), (20, 0)] {
                page(&file, number, byte);
            }
            let found = differing(Some(&before), &file).unwrap();
            assert_eq!(found, [Run(0, 1), Run(700, 1), Run(3000, 1), Run(4095, 1)], "{dir}");
            let found = differing(None, &file).unwrap();
            assert_eq!(found, [Run(0, 1), Run(3, 1), Run(700, 2), Run(3000, 1), Run(4095, 1)], "{dir}");
        }
    }

    #[test]
    fn a_file_is_where_its_data_is() {
        use std::os::unix::fs::FileExt as _;
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.set_len(1 << 30).unwrap();
        // More than are told at a time.
        for number in 0..600 {
            file.write_all_at(&[1; 4096], number << 20).unwrap();
        }
        let found = of(&file).unwrap();
        assert_eq!(found.len(), 600);
        assert!((0..600_u64).zip(&found).all(|(number, extent)| extent.range.contains(&(number << 20))));
        assert!(found.iter().all(|extent| extent.place.is_some()));
        assert_eq!(
            alike(&found, &found, 1 << 30).iter().map(|range| range.end - range.start).sum::<u64>(),
            1 << 30
        );
    }
}
