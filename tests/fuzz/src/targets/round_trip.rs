//! A migration through both filters: whatever the lists, the disks and the refusals, libxenguest at the target gets what libxenguest at
//! the source wrote.

use std::io::{Seek, SeekFrom, Write};
use std::net::Shutdown;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use enlightenment::Vdev;

use crate::engine::xen_stream::record as kinds;
use crate::engine::{Config, DiskName};
use crate::fake_guest::guest_stream::{
    Sent, beginning, beginning_pvh, disk_page, ending, other_page, page_data, record, restore,
};
use crate::fake_guest::pair::{AFTER_END, Pair, config, disk};
use crate::fake_guest::{XVDA, map};

/// Frames of the guest.
const PFNS: u64 = 64;
/// Pages of the disk.
const DISK_PAGES: u64 = 48;

/// A migration of random pages, hints, passes, disks, losses.
pub fn round_trip(data: &[u8]) {
    let _ = try_round_trip(&mut Unstructured::new(data));
}

fn content(choices: &mut Unstructured<'_>, pfn: u64, hint: Option<u64>) -> Result<Sent> {
    let page = u64::from(choices.arbitrary::<u8>()?) % DISK_PAGES;
    Ok(match choices.int_in_range(0..=15)? {
        0..=7 => Sent::page(pfn, hint.map_or_else(|| other_page(pfn), disk_page)),
        8 | 9 => Sent::page(pfn, vec![0; crate::engine::xen_stream::PAGE]),
        10 | 11 => Sent::page(pfn, disk_page(page)),
        12 => Sent::page(pfn, other_page(page)),
        13 => Sent::typed(pfn, [1, 2, 3, 4, 9, 10, 11, 12][page as usize % 8], disk_page(page)),
        _ => Sent::typed(pfn, [13, 14, 15][page as usize % 3], Vec::new()),
    })
}

fn try_round_trip(choices: &mut Unstructured<'_>) -> Result<()> {
    let mut image = disk(DISK_PAGES);
    let mut hints = std::collections::BTreeMap::new();
    for _ in 0..choices.int_in_range(0..=PFNS)? {
        let (pfn, page) = (choices.int_in_range(0..=PFNS - 1)?, choices.int_in_range(0..=DISK_PAGES + 3)?);
        hints.insert(pfn, page);
    }
    let windows = [0, 3, 16, 1000];
    let config = Config {
        window_bytes: *choices.choose(&windows)? * 4096,
        reference_passes: choices.int_in_range(1..=3)?,
        drain_timeout: if choices.ratio(1, 8)? { Duration::ZERO } else { Duration::from_secs(20) },
        // Both ends are here; the machine may be asleep meanwhile.
        hello_timeout: Duration::from_secs(24 * 3600),
        hashers: 1,
        readers: 1,
        io_uring: choices.arbitrary()?,
        ..config()
    };
    let path = if choices.ratio(1, 8)? { "/no/such/disk".into() } else { image.path().to_owned() };
    let named = DiskName { vdev: Vdev(XVDA), path };
    let mut target = config.clone();
    if choices.ratio(1, 4)? {
        // The target's own word counts, and is another.
        let own = if choices.arbitrary()? { image.path().into() } else { "/no/such/disk".into() };
        target.own_disks = Some(vec![DiskName { vdev: Vdev(XVDA), path: own }]);
    }
    let map = map(hints.iter().map(|(&pfn, &page)| (pfn, page)));
    let (pvh, verify) = (choices.arbitrary()?, choices.arbitrary::<bool>()?);
    let mut stream = if pvh { beginning_pvh() } else { beginning() };
    let mut pair = Pair::start(map, vec![named], config, target);
    pair.write(&stream);
    let batch = choices.int_in_range(1..=PFNS as usize)?;
    let mut last = std::collections::BTreeMap::new();
    for round in 0..choices.int_in_range(1..=3)? {
        pair.source.enter_round(round);
        let mut pass = Vec::new();
        for pfn in 0..PFNS {
            if round == 0 || choices.ratio(1, 8)? {
                pass.push(content(choices, pfn, hints.get(&pfn).copied())?);
            }
        }
        last.extend(pass.iter().map(|sent| (sent.entry.pfn, sent.clone())));
        for batch in pass.chunks(batch) {
            match choices.int_in_range(0..=31)? {
                0 => pair.side.shutdown(Shutdown::Both).unwrap(),
                1 => {
                    pair.source.drain().unwrap();
                }
                2 => {
                    let page = choices.int_in_range(0..=DISK_PAGES - 1)?;
                    image.seek(SeekFrom::Start(page * 4096)).unwrap();
                    image.write_all(&other_page(1000 + page)).unwrap();
                }
                3 => image.as_file().set_len(4096 * choices.int_in_range(0..=DISK_PAGES)?).unwrap(),
                _ => {}
            }
            let bytes = page_data(batch);
            pair.write(&bytes);
            stream.extend(bytes);
        }
    }
    let mut rest = Vec::new();
    if verify {
        rest.extend(record(kinds::VERIFY, &[]));
        rest.extend(page_data(&last.into_values().collect::<Vec<_>>()));
    }
    rest.extend(ending());
    pair.write(&rest);
    stream.extend(rest);
    let outcome = pair.finish();
    let (source, target) = (outcome.source.unwrap().stats, outcome.target.unwrap().stats);
    let (expected, found) = (restore(&stream), restore(&outcome.stream));
    assert!(found.verify_mismatches.is_empty(), "{:?}", found.verify_mismatches);
    for (pfn, page) in &expected.memory {
        assert!(found.memory.get(pfn) == Some(page), "PFN {pfn} differs");
    }
    assert!(found == expected, "what is not memory differs");
    assert_eq!(outcome.left_on_wire, AFTER_END);
    assert_eq!((source.references_outstanding, target.references_outstanding), (0, 0));
    assert_eq!((source.bytes_in, source.bytes_out), (stream.len() as u64, target.bytes_in));
    Ok(())
}
