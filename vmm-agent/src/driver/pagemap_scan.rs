//! The ioctl `PAGEMAP_SCAN` of `/proc/PID/pagemap` (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst): finds pages by what
//! they are, and in the same step protects them, so that the next scan finds those that were written since.
#![allow(unsafe_code)]

use std::{fs::File, io, os::fd::AsRawFd as _};

use super::{
    pages::{PAGE, Run},
    runs,
};

// include/uapi/linux/fs.h
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
/// Runs of pages that are told at a time.
const REGIONS: usize = 4096;

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

nix::ioctl_readwrite! {
    /// `PAGEMAP_SCAN`.
    pagemap_scan, b'f', 16, Scan
}

/// Which pages of a private mapping are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The process's own: no longer those of the file that it maps.
    Own,
    /// Of those the ones that were written since they were protected last, or never were.
    Written,
}

/// Finds the pages that are `wanted` in the `bytes` from `address` on, whose writes the kernel remembers
/// ([`super::userfaultfd::register`]). With `protect` they are not written, as far as later scans see, until they are.
///
/// # Errors
///
/// If the kernel does not remember writes there, or the process has ended. Some may be protected then.
pub fn scan(pagemap: &File, address: u64, bytes: u64, wanted: Wanted, protect: bool) -> io::Result<Vec<Run>> {
    let mut regions = vec![Region::default(); REGIONS];
    let mut runs: Vec<Run> = Vec::new();
    let end = address + bytes;
    let mut start = address;
    while start < end {
        let written = if wanted == Wanted::Written { PAGE_IS_WRITTEN } else { 0 };
        let mut asked = Scan {
            size: size_of::<Scan>() as u64,
            flags: PM_SCAN_CHECK_WPASYNC | if protect { PM_SCAN_WP_MATCHING } else { 0 },
            start,
            end,
            vec: regions.as_mut_ptr().addr() as u64,
            vec_len: REGIONS as u64,
            // Not a file's.
            category_inverted: PAGE_IS_FILE,
            category_mask: PAGE_IS_FILE | written,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            // Alike for all of them, so that those that follow each other are one.
            return_mask: PAGE_IS_FILE,
            ..Scan::default()
        };
        // SAFETY: the kernel reads and writes `asked`, and writes at most `vec_len` regions to `vec`, which has room for
        // them and is borrowed by nobody else. It protects pages of the other process, which changes none of them.
        let found = unsafe { pagemap_scan(pagemap.as_raw_fd(), &mut asked) }?;
        let found = regions.get(..usize::try_from(found).unwrap_or_default()).unwrap_or_default();
        for region in found {
            let [first, last] = [region.start, region.end].map(|at| page(at, address));
            let (first, last) = (first?, last?);
            runs.push(Run(first, last.saturating_sub(first)));
        }
        // It has come to the end. Where it says that it has come to is no sign of that: with more regions than it has a buffer
        // for, that is where it emptied the buffer last (Linux 6.18, do_pagemap_scan).
        if found.len() < REGIONS {
            break;
        }
        if asked.walk_end <= start {
            return Err(io::Error::other("the kernel does not come on with its scan"));
        }
        start = asked.walk_end;
    }
    // For the same reason some may be there twice.
    Ok(runs::settled(runs))
}

fn page(at: u64, address: u64) -> io::Result<u32> {
    let offset = at.checked_sub(address).ok_or(io::ErrorKind::InvalidData)?;
    u32::try_from(offset / PAGE).map_err(io::Error::other)
}
