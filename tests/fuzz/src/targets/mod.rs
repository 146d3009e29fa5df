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
    /// The file that it is written in.
    source: &'static str,
    run: fn(&[u8]),
}

/// A mebibyte.
const MIB: u64 = 1 << 20;

impl Target {
    /// The rooms whose code it runs: those that its file names, and the one that both stand on. Whoever goes by another module of this
    /// crate has all that the crate has.
    pub fn rooms(&self) -> impl Iterator<Item = &'static str> {
        let source = self.source;
        let names = move |what: &str| source.contains(what);
        let by_crate = names("crate::") || names("super::");
        let rooms = [
            ("dom0-migrator", names("dom0_migrator") || by_crate),
            ("enlightenment", true),
            ("guest-probe", names("guest_probe") || by_crate),
        ];
        rooms.into_iter().filter_map(|(room, is_named)| is_named.then_some(room))
    }

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
    (source, run): (&'static str, fn(&[u8])),
) -> Target {
    Target { name, about, longest, memory, source, run }
}

/// A target's function, and the text of its file.
macro_rules! of {
    ($file:ident :: $function:ident) => {
        (include_str!(concat!(stringify!($file), ".rs")), $file::$function)
    };
}

/// All of them.
pub const TARGETS: &[Target] = &[
    target(
        "page_data",
        "libxc's headers and PAGE_DATA, from a save or a peer",
        16 << 10,
        Some(MIB),
        of!(stream::page_data),
    ),
    target(
        "private_record",
        "our own records, from the source",
        16 << 10,
        Some(MIB),
        of!(stream::private_record),
    ),
    target(
        "built_record",
        "our own records, well made but for a few words",
        512,
        Some(16 * MIB),
        of!(stream::built_record),
    ),
    target("wire", "a whole stream and its hello, from a hostile source", 1024, None, of!(stream::wire)),
    target("verdicts", "answers and verdicts, from a hostile target", 1024, None, of!(stream::verdicts)),
    target(
        "side_message",
        "messages of the side channel, from the peer",
        4096,
        Some(8 * MIB),
        of!(messages::side_message),
    ),
    target(
        "control_line",
        "lines of the control connection, from a stranger, and a stream's offer of a side channel",
        4096,
        Some(MIB),
        of!(messages::control_line),
    ),
    target(
        "handoff",
        "events and orders between a helper and its command",
        8192,
        Some(8 * MIB),
        of!(messages::handoff),
    ),
    target("travel", "how pages travelled, from a helper", 16 << 10, Some(512 * MIB), of!(messages::travel)),
    target("list_page", "one page of the lists, from the guest", 4096, Some(MIB), of!(lists::page)),
    target(
        "walk",
        "whole lists that change while they are read, from the guest",
        2048,
        Some(16 * MIB),
        of!(lists::walk),
    ),
    target(
        "handover_record",
        "records of migrations, from the disk",
        4096,
        Some(MIB),
        of!(records::handover),
    ),
    target(
        "report_file",
        "a report and the page made of it, from anybody",
        16 << 10,
        Some(64 * MIB),
        of!(records::report),
    ),
    target(
        "configuration",
        "both programs' configuration, from the operator",
        4096,
        Some(8 * MIB),
        of!(records::configuration),
    ),
    target(
        "catalogue",
        "a catalogue of builds, from the operator",
        8192,
        Some(8 * MIB),
        of!(mysqld::catalogue),
    ),
    target(
        "xenstore",
        "replies of xenstored, and nodes that a guest writes",
        4096,
        Some(MIB),
        of!(toolstack::xenstore),
    ),
    target("xl", "xl's stream and its words, and libxl's arguments", 4096, Some(4 * MIB), of!(toolstack::xl)),
    target(
        "domain_configuration",
        "a domain's disks, from the source's xl",
        4096,
        Some(4 * MIB),
        of!(toolstack::disks),
    ),
    target("elf", "a program file in the guest", 8192, Some(128 * MIB), of!(guest_files::elf)),
    target(
        "tablespace",
        "the first page of a data file in the guest",
        256,
        Some(MIB),
        of!(guest_files::tablespace),
    ),
    target("control_blocks", "mysqld's memory", 4096, Some(8 * MIB), of!(mysqld::control_blocks)),
    target("fiemap", "a file system's answers", 4096, Some(MIB), of!(storage::fiemap)),
    target("dm_table", "the device mapper's answers", 4096, Some(MIB), of!(storage::dm_table)),
    target(
        "device_map",
        "mapped devices on partitions on disks",
        512,
        Some(32 * MIB),
        of!(storage::device_map),
    ),
    target(
        "round_trip",
        "a migration through both filters, compared",
        512,
        None,
        of!(round_trip::round_trip),
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_has_the_rooms_that_its_file_names() {
        let rooms = |name| {
            let target = TARGETS.iter().find(|target| target.name == name).unwrap();
            target.rooms().collect::<Vec<_>>()
        };
        assert_eq!(rooms("elf"), ["enlightenment", "guest-probe"]);
        assert_eq!(rooms("xenstore"), ["dom0-migrator", "enlightenment"]);
        assert_eq!(rooms("configuration"), ["dom0-migrator", "enlightenment", "guest-probe"]);
        assert_eq!(rooms("round_trip"), ["dom0-migrator", "enlightenment", "guest-probe"]);
    }
}
