//! Why a frame is in neither list.

use serde::{Deserialize, Serialize};

/// A reason. When in doubt a page is sent: that costs four packets, not a bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeftOut {
    /// It has changes that are not on disk.
    Dirty,
    /// A read or a write is under way.
    IoPending,
    /// A thread uses the page: a change may be half done.
    InUse,
    /// The frame table has another page there, or none: an event is on its way.
    TableDiffers,
    /// The page is of a dropped or truncated tablespace.
    Stale,
    /// A temporary tablespace.
    Temporary,
    /// Compressed by row format.
    Compressed,
    /// Encrypted.
    Encrypted,
    /// No file, or two, hold the tablespace.
    NoFile,
    /// Its file has another name since the last scan.
    FileGone,
    /// Its file is too short, or it lies in a further file of the tablespace.
    BeyondFile,
    /// It does not lie on disk as a whole.
    Hole,
    /// Its bytes lie behind the disk's end.
    BeyondDisk,
    /// None of its guest pages lies in one piece.
    Misaligned,
    /// Its room in the file is reserved and was never written.
    Unwritten,
    /// The file system has not placed its bytes yet, or does not say where.
    NotPlaced,
    /// It lies inside the file system's own structures, or in a tail shared with other files.
    Inline,
    /// The file system compresses or encrypts it.
    Encoded,
    /// Its bytes are shared with another file (reflink, snapshot): the next write goes elsewhere.
    Shared,
    /// The file system does not tell where its files lie.
    Unmappable,
    /// The file system is none whose answers are known to be places on its device: ext2, ext3, ext4 and XFS are.
    OtherFileSystem,
    /// The file is on XFS's realtime device.
    Realtime,
    /// The file system lies on no disk of its own.
    NoDisk,
    /// The disk is put together by md (RAID).
    Raid,
    /// The device mapper encrypts it (crypt).
    DmCrypt,
    /// Thinly provisioned by the device mapper (thin): its place moves.
    DmThin,
    /// The device mapper spreads it over disks (striped, RAID, mirror).
    DmStriped,
    /// The device mapper keeps a snapshot of it.
    DmSnapshot,
    /// There are several paths to its disk (multipath).
    DmMultipath,
    /// The device mapper does something else with it.
    DmOther,
    /// The device mapper's table cannot be read.
    DmUnreadable,
    /// The disk is none of Xen's.
    NotXen,
}

impl LeftOut {
    /// The reason for people.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Dirty => "dirty",
            Self::IoPending => "being read or written",
            Self::InUse => "in use by a thread",
            Self::TableDiffers => "an event is on its way",
            Self::Stale => "of a dropped or truncated table",
            Self::Temporary => "temporary",
            Self::Compressed => "compressed on disk",
            Self::Encrypted => "encrypted on disk",
            Self::NoFile => "no file, or more than one, has the tablespace",
            Self::FileGone => "the file has another name now",
            Self::BeyondFile => "behind the file's end",
            Self::Hole => "not on disk as a whole",
            Self::BeyondDisk => "behind the disk's end",
            Self::Misaligned => "in pieces smaller than a guest page",
            Self::Unwritten => "reserved in the file, never written",
            Self::NotPlaced => "not placed on disk yet",
            Self::Inline => "inside the file system's own structures",
            Self::Encoded => "compressed or encrypted by the file system",
            Self::Shared => "shared with another file (reflink)",
            Self::OtherFileSystem => "on a file system that is neither ext2, ext3, ext4 nor XFS",
            Self::Realtime => "on XFS's realtime device",
            Self::Raid => "on a RAID of md",
            Self::DmCrypt => "encrypted by the device mapper",
            Self::DmThin => "on a thin volume",
            Self::DmStriped => "on a striped or mirrored volume",
            Self::DmSnapshot => "on a volume with a snapshot",
            Self::DmMultipath => "on a multipath device",
            Self::DmOther => "on a volume of another kind than linear",
            Self::DmUnreadable => "on a volume whose table cannot be read",
            Self::Unmappable => "the file system does not tell where",
            Self::NoDisk => "on no disk of its own",
            Self::NotXen => "on a disk that is none of Xen's",
        }
    }
}
