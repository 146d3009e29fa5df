//! Loads the eBPF programs and attaches them to a running mysqld; hands out their events.
//!
//! Everything hangs on file descriptors of this process: when it ends, in whatever way, the kernel takes the probes out of mysqld.

use std::num::NonZeroU32;
use std::os::fd::{AsFd, BorrowedFd};

use aya::maps::{MapData, MapError, PerCpuArray, RingBuf};
use aya::programs::uprobe::{UProbeAttachLocation, UProbeScope};
use aya::programs::{ProgramError, UProbe};
use aya::{Ebpf, EbpfError, EbpfLoader, GlobalData, include_bytes_aligned};
use aya_log::EbpfLogger;
use thiserror::Error;

use crate::catalogue::{Build, Functions};
use crate::elf::{Elf, ElfError, ProbePlace, ReadAt};
use crate::event::{COUNTER_LOST, COUNTER_UNREADABLE, Event, EventKind, Layout};
use crate::process::MysqldProcess;

static OBJECT: &[u8] = include_bytes_aligned!("../ebpf/guest-probe-ebpf.o");

/// Bytes in the ring buffer: 32,768 events of 24 bytes with 8 of the kernel's own.
pub const RING_BYTES: u32 = 1 << 20;

/// Bytes in the smallest one, a page.
const LEAST_RING_BYTES: u32 = 4096;

/// Why probes are not in place.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// The kernel does not take the programs.
    #[error("the kernel refuses the eBPF programs: {0}{advice}", advice = advice(.0.as_ref()))]
    Load(#[source] Box<EbpfError>),
    /// A program is not in the object.
    #[error("the eBPF object has no {0} {1}: it was built from other sources")]
    Missing(&'static str, &'static str),
    /// A program cannot be loaded or attached.
    #[error("cannot attach {program} to {symbol} at {offset:#x} of {path}: {source}{}", advice(source.as_ref()))]
    Attach {
        /// The program.
        program: &'static str,
        /// The function.
        symbol: String,
        /// File offset.
        offset: u64,
        /// The file.
        path: String,
        /// Why.
        source: Box<ProgramError>,
    },
    /// A map cannot be used.
    #[error("cannot use an eBPF map: {0}")]
    Map(#[from] MapError),
    /// A function is not where the catalogue says.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// The PID is none.
    #[error("{0} is no PID")]
    Pid(i32),
}

/// What to do, by what the kernel said.
fn advice(error: &(dyn std::error::Error + 'static)) -> &'static str {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<std::io::Error>() {
            return match error.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => {
                    " (guest-probe needs CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN, as root has outside of containers; \
                     /sys/kernel/security/lockdown tells whether the kernel forbids it to everybody)"
                }
                Some(libc::ENOSYS | libc::ENODEV | libc::ENOENT) => {
                    " (it needs CONFIG_BPF_SYSCALL and CONFIG_UPROBE_EVENTS)"
                }
                _ => " (it needs Linux 5.8 or later)",
            };
        }
        cause = error.source();
    }
    " (it needs Linux 5.8 or later)"
}

/// A program and the function that it goes to.
struct Attachment<'a> {
    program: &'static str,
    symbol: &'a str,
}

fn attachments(functions: &Functions) -> [Attachment<'_>; 8] {
    [
        Attachment { program: "read_complete", symbol: &functions.read_complete },
        Attachment { program: "page_create", symbol: &functions.page_create },
        Attachment { program: "page_dirty", symbol: &functions.page_dirty },
        Attachment { program: "page_clean", symbol: &functions.page_clean },
        Attachment { program: "frame_free", symbol: &functions.frame_free },
        Attachment { program: "file_open", symbol: &functions.file_open },
        Attachment { program: "pool_resize", symbol: &functions.chunk_allocate },
        Attachment { program: "pool_resize", symbol: &functions.chunk_deallocate },
    ]
}

/// A function with its probe.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The program.
    pub program: &'static str,
    /// The function.
    pub symbol: String,
    /// Where in it.
    pub place: ProbePlace,
}

/// Numbers of events that did not arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missed {
    /// The ring buffer was full.
    pub lost: u64,
    /// The control block could not be read.
    pub unreadable: u64,
}

impl Missed {
    /// All of them.
    pub const fn total(self) -> u64 {
        self.lost + self.unreadable
    }
}

/// Probes in place.
pub struct Probes {
    /// Holds programs and links: to drop it is to detach.
    ebpf: Ebpf,
    ring: RingBuf<MapData>,
    counters: PerCpuArray<MapData, u64>,
    logger: Option<EbpfLogger<&'static dyn log::Log>>,
    attached: Vec<Attached>,
}

impl Probes {
    /// Attaches all programs to the process.
    ///
    /// # Errors
    /// [`ProbeError`]; then nothing stays attached.
    pub fn attach<F: ReadAt + ?Sized>(
        process: &MysqldProcess,
        elf: &Elf<'_, F>,
        build: &Build,
        ring_bytes: u32,
    ) -> Result<Self, ProbeError> {
        let pid = u32::try_from(process.pid).ok().and_then(NonZeroU32::new);
        let scope = UProbeScope::OneProcess(pid.ok_or(ProbeError::Pid(process.pid))?);
        let mut probes = Self::load(build.event_layout(ring_bytes / 2), ring_bytes)?;
        let wanted = attachments(&build.functions);
        let names: Vec<&str> = wanted.iter().map(|attachment| attachment.symbol).collect();
        let places = elf.symbols(&names)?;
        for (attachment, place) in wanted.iter().zip(places) {
            let place = elf.probe_place(attachment.symbol, place)?;
            probes.attach_one(process, attachment, place, scope)?;
        }
        Ok(probes)
    }

    /// Whether the kernel lets this process do all that [`Probes::attach`] will: loads the programs, and attaches one to the first byte of this
    /// program's own file. That is no code, so nothing ever runs into it, but the kernel takes it for a jump (0x7f) and so for a fit
    /// place. Then all is taken out again.
    ///
    /// # Errors
    /// [`ProbeError`] with what is forbidden or missing.
    pub fn check() -> Result<(), ProbeError> {
        let mut probes = Self::load(Layout::default(), LEAST_RING_BYTES)?;
        let path = "/proc/self/exe";
        let (mut last, me) = (None, NonZeroU32::new(std::process::id()));
        let scope = UProbeScope::OneProcess(me.ok_or(ProbeError::Pid(0))?);
        for (name, program) in probes.ebpf.programs_mut() {
            let failed = |source| ProbeError::Attach {
                program: "a program",
                symbol: name.to_owned(),
                offset: 0,
                path: path.to_owned(),
                source: Box::new(source),
            };
            let program: &mut UProbe = program.try_into().map_err(failed)?;
            program.load().map_err(failed)?;
            last = Some((program, failed));
        }
        let (program, failed) = last.ok_or(ProbeError::Missing("program", "at all"))?;
        program.attach(UProbeAttachLocation::AbsoluteOffset(0), path, scope).map_err(failed)?;
        Ok(())
    }

    /// Hands the programs and their maps to the kernel; nothing is attached yet.
    fn load(layout: Layout, ring_bytes: u32) -> Result<Self, ProbeError> {
        let layout = LayoutGlobal(layout);
        let log_level: u8 =
            if tracing::enabled!(tracing::Level::DEBUG) { aya_log::Level::Debug as u8 } else { 0 };
        // The programs read mysqld's structures alone, so the kernel's own types (BTF) are not needed: a kernel without will do, and
        // parsing them takes 13 MB.
        let mut ebpf = EbpfLoader::new()
            .btf(None)
            .override_global("LAYOUT", GlobalData::from(&layout), true)
            .override_global(aya_log::LEVEL, GlobalData::from(&log_level), true)
            .map_max_entries("EVENTS", ring_bytes)
            .load(OBJECT)
            .map_err(|error| ProbeError::Load(Box::new(error)))?;
        let ring = RingBuf::try_from(ebpf.take_map("EVENTS").ok_or(ProbeError::Missing("map", "EVENTS"))?)?;
        let counters = ebpf.take_map("COUNTERS").ok_or(ProbeError::Missing("map", "COUNTERS"))?;
        let counters = PerCpuArray::try_from(counters)?;
        // Dropping the logger would make the programs' log map go away before they are loaded.
        let logger = EbpfLogger::init(&mut ebpf)
            .inspect_err(|error| tracing::warn!(%error, "no log of the eBPF programs"));
        Ok(Self { ebpf, ring, counters, logger: logger.ok(), attached: Vec::new() })
    }

    fn attach_one(
        &mut self,
        process: &MysqldProcess,
        attachment: &Attachment<'_>,
        place: ProbePlace,
        scope: UProbeScope,
    ) -> Result<(), ProbeError> {
        let path = process.exe_path();
        let failed = |source| ProbeError::Attach {
            program: attachment.program,
            symbol: attachment.symbol.to_owned(),
            offset: place.file_offset,
            path: path.display().to_string(),
            source: Box::new(source),
        };
        let program = self.ebpf.program_mut(attachment.program);
        let program = program.ok_or(ProbeError::Missing("program", attachment.program))?;
        let program: &mut UProbe = program.try_into().map_err(failed)?;
        if program.fd().is_err() {
            program.load().map_err(failed)?;
        }
        if !place.emulated {
            tracing::warn!(
                symbol = attachment.symbol,
                "the function does not begin with a push: each call of it will cost ten times more"
            );
        }
        program
            .attach(UProbeAttachLocation::AbsoluteOffset(place.file_offset), &path, scope)
            .map_err(failed)?;
        let Attachment { program, symbol } = attachment;
        self.attached.push(Attached { program, symbol: (*symbol).to_owned(), place });
        Ok(())
    }

    /// Where the probes are.
    pub fn attached(&self) -> &[Attached] {
        &self.attached
    }

    /// Takes all events that wait, in the order in which they happened, and returns how many there were. An event of a kind
    /// that is not known counts, and is handed to nobody.
    pub fn drain(&mut self, mut each: impl FnMut(EventKind, &Event)) -> u64 {
        let mut taken = 0;
        while let Some(item) = self.ring.next() {
            taken += 1;
            if let Some((kind, event)) = parse_event(&item) {
                each(kind, &event);
            }
        }
        if let Some(logger) = &mut self.logger {
            logger.flush();
        }
        taken
    }

    /// Events that did not arrive, since the probes are in place.
    ///
    /// # Errors
    /// [`ProbeError::Map`].
    pub fn missed(&self) -> Result<Missed, ProbeError> {
        let sum = |index: u32| -> Result<u64, ProbeError> { Ok(self.counters.get(&index, 0)?.iter().sum()) };
        Ok(Missed { lost: sum(COUNTER_LOST)?, unreadable: sum(COUNTER_UNREADABLE)? })
    }

    /// The kernel's numbers of our programs, with their names.
    pub fn program_ids(&self) -> Vec<(String, u32)> {
        let ids = self.ebpf.programs().filter_map(|(name, program)| {
            let info = program.info().ok()?;
            Some((name.to_owned(), info.id()))
        });
        ids.collect()
    }

    /// Becomes readable when the ring buffer is half full.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

/// An event as its bytes have it; `None` when they are too few or its kind is not known.
fn parse_event(bytes: &[u8]) -> Option<(EventKind, Event)> {
    use crate::bytes::{u32_le, u64_le};
    let event = Event {
        frame: u64_le(bytes, 0)?,
        space: u32_le(bytes, 8)?,
        page: u32_le(bytes, 12)?,
        kind: u32_le(bytes, 16)?,
        reserved: u32_le(bytes, 20)?,
    };
    Some((EventKind::from_u32(event.kind)?, event))
}

/// [`Layout`], as aya wants what it writes into a program's global.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct LayoutGlobal(Layout);

// SAFETY: eight u32 without padding (its size is asserted in event.rs): any bytes are one, and all its bytes are initialised.
unsafe impl aya::Pod for LayoutGlobal {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_parsed_as_it_is_sent() {
        let mut bytes = Vec::new();
        bytes.extend(0x7000_u64.to_le_bytes());
        for value in [3_u32, 4, EventKind::Dirty as u32, 0] {
            bytes.extend(value.to_le_bytes());
        }
        let (kind, event) = parse_event(&bytes).unwrap();
        assert_eq!((kind, event.frame, event.space, event.page), (EventKind::Dirty, 0x7000, 3, 4));
        assert!(parse_event(&bytes[..23]).is_none());
        bytes[16] = 99;
        assert!(parse_event(&bytes).is_none());
    }
}
