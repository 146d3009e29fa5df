//! What the guest's kernel tells of files, volumes and disks.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::sync::OnceLock;

use arbitrary::{Result, Unstructured};
use guest_probe::disk::{DeviceNumber, find};
use guest_probe::dm::{Answer, DmError, Tables, Target, TargetKind, parse_answer};
use guest_probe::fiemap::ExtentMap;

/// Bytes of `struct fiemap` before its extents, and of an extent.
const FIEMAP: (usize, usize) = (32, 56);

/// Answers as they are, and answers of extents as choices have them: what is handed out lies within what was asked for, without gap or
/// overlap.
pub fn fiemap(data: &[u8]) {
    let _ = ExtentMap::default().add_answer(data, 0);
    let mut choices = Unstructured::new(data);
    let _ = try_fiemap(&mut choices);
}

fn try_fiemap(choices: &mut Unstructured<'_>) -> Result<()> {
    let mut map = ExtentMap::default();
    let mut start = 0;
    for _ in 0..choices.int_in_range(1..=4)? {
        let extents = choices.int_in_range(0..=6_u32)?;
        let mut answer = vec![0; FIEMAP.0];
        answer[20..24].copy_from_slice(&extents.to_le_bytes());
        let mut at = start;
        for index in 0..extents {
            let wild = choices.ratio(1, 16)?;
            let mut number = |tame: u64| if wild { choices.arbitrary() } else { Ok(tame) };
            let logical = number(at)?;
            let physical = number(at.wrapping_add(77).wrapping_mul(3))?;
            let length = number(4096)?;
            let gap = u64::from(choices.arbitrary::<u8>()?) * 512;
            let last = u32::from(index + 1 == extents && choices.arbitrary()?);
            let flags = if choices.ratio(1, 4)? { choices.arbitrary::<u32>()? & !1 } else { 0 } | last;
            let mut extent = vec![0; FIEMAP.1];
            extent[0..8].copy_from_slice(&logical.to_le_bytes());
            extent[8..16].copy_from_slice(&physical.to_le_bytes());
            extent[16..24].copy_from_slice(&length.to_le_bytes());
            extent[40..44].copy_from_slice(&flags.to_le_bytes());
            answer.extend(extent);
            at = logical.saturating_add(length).saturating_add(gap);
        }
        match map.add_answer(&answer, start) {
            Ok(Some(next)) => {
                assert!(next > start, "the next question would be the same");
                start = next;
            }
            Ok(None) | Err(_) => break,
        }
    }
    let (from, length) = (choices.arbitrary::<u32>()?.into(), u64::from(choices.arbitrary::<u16>()?));
    let mut next = from;
    let whole = map.pieces(from, length, |piece| {
        assert!(piece.logical == next && piece.length > 0);
        assert!(piece.physical.checked_add(piece.length).is_some());
        next += piece.length;
    });
    assert!(next <= from + length && whole.is_ok() == (next == from + length));
    let (fit, unfit) = map.bytes();
    assert_eq!(map.is_empty(), fit == 0 && unfit.is_empty());
    Ok(())
}

/// A table that is taken has no gaps.
pub fn dm_table(data: &[u8]) {
    let check = |answer: &[u8]| {
        if let Some(Answer::Table(targets)) = parse_answer(answer) {
            let mut next = 0;
            for target in &targets {
                assert!(target.start == next && target.sectors > 0);
                next = target.start + target.sectors;
                let _ = target.kind.unfit();
            }
        }
    };
    check(data);
    // The same with a head that is right, so that it comes to the targets. The first byte is their number.
    let Some((count, targets)) = data.split_first() else { return };
    let mut answer = vec![0; 312];
    answer.extend(targets);
    let length = answer.len() as u32;
    answer[12..16].copy_from_slice(&length.to_le_bytes());
    answer[16..20].copy_from_slice(&312_u32.to_le_bytes());
    answer[20..24].copy_from_slice(&u32::from(*count).to_le_bytes());
    check(&answer);
}

/// A sysfs with a Xen disk of 64 MiB, a partition on it, and three mapped devices of whatever tables.
fn sysfs() -> &'static tempfile::TempDir {
    static SYSFS: OnceLock<tempfile::TempDir> = OnceLock::new();
    SYSFS.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let at = |path: &str| directory.path().join(path);
        let write = |path: &str, text: &str| {
            fs::create_dir_all(at(path).parent().unwrap()).unwrap();
            fs::write(at(path), text).unwrap();
        };
        let disk = "devices/vbd-51712/block/xvda";
        write(&format!("{disk}/size"), "131072\n");
        write(&format!("{disk}/dev"), "202:0\n");
        for (file, text) in [("partition", "1\n"), ("start", "2048\n"), ("size", "100000\n")] {
            write(&format!("{disk}/xvda1/{file}"), text);
        }
        symlink("../../../vbd-51712", at(disk).join("device")).unwrap();
        fs::create_dir_all(at("dev/block")).unwrap();
        symlink(format!("../../{disk}"), at("dev/block/202:0")).unwrap();
        symlink(format!("../../{disk}/xvda1"), at("dev/block/202:1")).unwrap();
        for minor in 0..3 {
            let own = format!("devices/virtual/block/dm-{minor}");
            write(&format!("{own}/size"), "300\n");
            fs::create_dir_all(at(&own).join("dm")).unwrap();
            symlink(format!("../../{own}"), at(&format!("dev/block/253:{minor}"))).unwrap();
        }
        directory
    })
}

struct Made(HashMap<DeviceNumber, Vec<Target>>);

impl Tables for Made {
    fn table(&self, device: DeviceNumber) -> std::result::Result<Vec<Target>, DmError> {
        self.0.get(&device).cloned().ok_or(DmError::Answer { device })
    }
}

fn tables(choices: &mut Unstructured<'_>) -> Result<Made> {
    let mut tables = HashMap::new();
    for minor in 0..3 {
        let mut targets = Vec::new();
        let mut start = 0;
        for _ in 0..choices.int_in_range(0..=4)? {
            let sectors = u64::from(choices.arbitrary::<u8>()?) + 1;
            let under = match choices.int_in_range(0..=5)? {
                0 => DeviceNumber { major: 202, minor: 0 },
                under @ 1..=3 => DeviceNumber { major: 253, minor: under - 1 },
                _ => DeviceNumber { major: 202, minor: 1 },
            };
            let kind = match choices.int_in_range(0..=7)? {
                0 => TargetKind::Other("crypt".into()),
                1 => TargetKind::Linear { device: under, start: choices.arbitrary()? },
                _ => TargetKind::Linear { device: under, start: u64::from(choices.arbitrary::<u16>()?) },
            };
            targets.push(Target { start, sectors, kind });
            start += sectors;
        }
        tables.insert(DeviceNumber { major: 253, minor }, targets);
    }
    Ok(Made(tables))
}

/// What a mapped device leads to lies on the disk, in order and without gap.
pub fn device_map(data: &[u8]) {
    let mut choices = Unstructured::new(data);
    let Ok(tables) = tables(&mut choices) else { return };
    for minor in 0..3 {
        let Ok(map) = find(sysfs().path(), &tables, DeviceNumber { major: 253, minor }) else { continue };
        for (offset, length) in [(0, 300 * 512), (100 * 512, 4096), (u64::MAX, 1)] {
            let mut into = 0;
            let whole = map.pieces(offset, length, |piece| {
                assert_eq!(piece.into, into);
                assert!(piece.disk_offset + piece.length <= piece.place.bytes);
                into += piece.length;
            });
            assert!(into <= length && whole.is_ok() == (into == length));
        }
        assert!(map.words().count() > 0);
    }
}
