//! The elements of the packet filter's sets, changed by netlink: in one transaction, and without a process
//! (linux/netfilter/nf_tables.h).

use std::io;

use super::netfilter::{Answer, Message, Netfilter, attribute, nested};

/// Messages of our own subsystem.
const OURS: u16 = (libc::NFNL_SUBSYS_NFTABLES as u16) << 8;
/// All who begin or end a transaction.
const FAMILY_ANY: u8 = 0;
/// `inet` tables.
const FAMILY_INET: u8 = libc::NFPROTO_INET as u8;
/// enum nft_set_elem_list_attributes.
const LIST_TABLE: u16 = 1;
const LIST_SET: u16 = 2;
const LIST_ELEMENTS: u16 = 3;
/// enum nft_list_attributes, nft_set_elem_attributes and nft_data_attributes.
const ELEMENT: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const DATA_VALUE: u16 = 1;

/// Has each of the `sets` of an `inet` table in this thread's namespace hold the key that comes with it and nothing else, or
/// nothing at all. In a set of intervals, a key alone is where one begins that has no end.
///
/// # Errors
///
/// If there are no such sets, or the kernel does not take it: then they are as they were.
pub fn fill(table: &str, sets: &[(&str, Option<&[u8]>)]) -> io::Result<()> {
    let mut batch = Batch::default();
    batch.border(libc::NFNL_MSG_BATCH_BEGIN);
    for &(set, key) in sets {
        let named = [attribute(LIST_TABLE, &text(table)), attribute(LIST_SET, &text(set))].concat();
        // Without elements: all there are.
        batch.add(libc::NFT_MSG_DELSETELEM, &named);
        if let Some(key) = key {
            let element = nested(ELEMENT, &nested(ELEMENT_KEY, &attribute(DATA_VALUE, key)));
            let filled = [named, nested(LIST_ELEMENTS, &element)].concat();
            batch.add(libc::NFT_MSG_NEWSETELEM, &filled);
        }
    }
    batch.border(libc::NFNL_MSG_BATCH_END);
    batch.commit()
}

/// Messages that are taken all together, or not at all.
#[derive(Debug, Default)]
struct Batch {
    bytes: Vec<u8>,
    /// Messages whose success is told.
    told: usize,
}

impl Batch {
    /// Where a transaction of our subsystem begins, or ends.
    fn border(&mut self, kind: libc::c_int) {
        let resource = libc::NFNL_SUBSYS_NFTABLES as u16;
        let border = Message { kind: kind as u16, flags: 0, family: FAMILY_ANY, resource, attributes: &[] };
        border.write(&mut self.bytes);
    }

    fn add(&mut self, kind: libc::c_int, attributes: &[u8]) {
        self.told += 1;
        let (kind, flags) = (OURS | kind as u16, libc::NLM_F_ACK as u16);
        Message { kind, flags, family: FAMILY_INET, resource: 0, attributes }.write(&mut self.bytes);
    }

    fn commit(self) -> io::Result<()> {
        let netfilter = Netfilter::open()?;
        netfilter.send(&self.bytes)?;
        let mut told = 0;
        let is_whole = netfilter.answers(|answer| {
            match answer {
                Answer::Refused(error) => return Err(error.into()),
                Answer::Done => told += 1,
                Answer::Item(_) => {}
            }
            Ok(told == self.told)
        })?;
        if is_whole { Ok(()) } else { Err(io::Error::other("the packet filter does not answer")) }
    }
}

/// A string, as the kernel takes one.
fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}
