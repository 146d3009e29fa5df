//! The targets.

mod guest_files;
mod lists;
mod messages;
mod mysqld;
mod records;
mod round_trip;
mod storage;
mod stream;
mod toolstack;

use crate::allocation::Spent;

/// A target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its corpus.
    pub name: &'static str,
    /// Whose bytes it takes, and what is looked at.
    pub about: &'static str,
    /// Longest input that is worth making up, in bytes.
    pub longest: usize,
    /// Most bytes that the thread may hold for any such input; none where the work is other threads'.
    memory: Option<u64>,
    run: fn(&[u8]),
}

/// A mebibyte.
const MIB: u64 = 1 << 20;

impl Target {
    /// Whether it runs a filter, and so threads and connections, for each input.
    pub fn is_a_migration(&self) -> bool {
        self.memory.is_none()
    }

    /// Runs it on an input.
    ///
    /// # Panics
    /// When something does not hold.
    pub fn run(&self, data: &[u8]) {
        let spent = Spent::on(|| (self.run)(data));
        if let Some(most) = self.memory {
            let Spent { peak_bytes } = spent;
            assert!(peak_bytes <= most, "{} held {peak_bytes} bytes for {} of input", self.name, data.len());
        }
    }
}

const fn target(
    name: &'static str,
    about: &'static str,
    longest: usize,
    memory: Option<u64>,
    run: fn(&[u8]),
) -> Target {
    Target { name, about, longest, memory, run }
}

/// All of them.
pub const TARGETS: &[Target] = &[
    target(
        "page_data",
        "libxc's headers and PAGE_DATA, from a save or a peer",
        16 << 10,
        Some(MIB),
        stream::page_data,
    ),
    target("private_record", "our own records, from the source", 16 << 10, Some(MIB), stream::private_record),
    target(
        "built_record",
        "our own records, well made but for a few words",
        512,
        Some(16 * MIB),
        stream::built_record,
    ),
    target("wire", "a whole stream and its hello, from a hostile source", 1024, None, stream::wire),
    target("verdicts", "answers and verdicts, from a hostile target", 1024, None, stream::verdicts),
    target(
        "side_message",
        "messages of the side channel, from the peer",
        4096,
        Some(8 * MIB),
        messages::side_message,
    ),
    target(
        "control_line",
        "lines of the control connection, from a stranger, and a stream's offer of a side channel",
        4096,
        Some(MIB),
        messages::control_line,
    ),
    target(
        "handoff",
        "events and orders between a helper and its command",
        8192,
        Some(8 * MIB),
        messages::handoff,
    ),
    target("travel", "how pages travelled, from a helper", 16 << 10, Some(512 * MIB), messages::travel),
    target("list_page", "one page of the lists, from the guest", 4096, Some(MIB), lists::page),
    target(
        "walk",
        "whole lists that change while they are read, from the guest",
        2048,
        Some(16 * MIB),
        lists::walk,
    ),
    target("handover_record", "records of migrations, from the disk", 4096, Some(MIB), records::handover),
    target(
        "report_file",
        "a report and the page made of it, from anybody",
        16 << 10,
        Some(64 * MIB),
        records::report,
    ),
    target(
        "configuration",
        "both programs' configuration, from the operator",
        4096,
        Some(8 * MIB),
        records::configuration,
    ),
    target("catalogue", "a catalogue of builds, from the operator", 8192, Some(8 * MIB), records::catalogue),
    target(
        "xenstore",
        "replies of xenstored, and nodes that a guest writes",
        4096,
        Some(MIB),
        toolstack::xenstore,
    ),
    target("xl", "xl's stream and its words, and libxl's arguments", 4096, Some(4 * MIB), toolstack::xl),
    target(
        "domain_configuration",
        "a domain's disks, from the source's xl",
        4096,
        Some(4 * MIB),
        toolstack::disks,
    ),
    target("elf", "a program file in the guest", 8192, Some(128 * MIB), guest_files::elf),
    target(
        "tablespace",
        "the first page of a data file in the guest",
        256,
        Some(MIB),
        guest_files::tablespace,
    ),
    target("control_blocks", "mysqld's memory", 4096, Some(8 * MIB), mysqld::control_blocks),
    target("fiemap", "a file system's answers", 4096, Some(MIB), storage::fiemap),
    target("dm_table", "the device mapper's answers", 4096, Some(MIB), storage::dm_table),
    target("device_map", "mapped devices on partitions on disks", 512, Some(32 * MIB), storage::device_map),
    target("round_trip", "a migration through both filters, compared", 512, None, round_trip::round_trip),
];
