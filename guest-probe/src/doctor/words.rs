//! The report for people.

use std::fmt;

use super::{FieldReport, FileReport, Report};

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => writeln!(f, "mysqld      process {pid}, {}", self.program)?,
            None => writeln!(f, "program     {}", self.program)?,
        }
        match (&self.build_id, &self.package) {
            (Some(id), Some(package)) => writeln!(f, "build       {id}: in the catalogue as {package}")?,
            (Some(id), None) => writeln!(f, "build       {id}: not in the catalogue")?,
            (None, _) => writeln!(f, "build       none")?,
        }
        if let Some(found) = &self.mariadb_read_completion {
            let entry = if found.cheap { "begins with a push: cheap" } else { "is single-stepped" };
            let (address, reference) = (found.address, found.reference);
            writeln!(
                f,
                "MariaDB     read completion at {address:#x}, by its text at {reference:#x}; it {entry}"
            )?;
        }
        for symbol in &self.symbols {
            let place = symbol.address.map_or_else(String::new, |address| format!(" at {address:#x}"));
            let entry = symbol.entry.as_ref().map_or_else(String::new, |entry| format!(", {entry}"));
            let doubt = symbol.doubt.as_ref().map_or_else(String::new, |doubt| format!(" NOT SURE: {doubt}"));
            writeln!(f, "symbol      {}{place}{entry}{doubt}", symbol.called)?;
        }
        for field in &self.fields {
            writeln!(f, "offset      {field}")?;
        }
        if let Some(agreement) = &self.agreement {
            writeln!(
                f,
                "agreement   {} of {} control blocks agree, {} contradict, {} were busy, {} are free; {} clean pages compared with their files",
                agreement.agree,
                agreement.blocks,
                agreement.contradict,
                agreement.busy,
                agreement.free,
                agreement.compared
            )?;
        }
        for file in &self.files {
            writeln!(f, "storage     {file}")?;
        }
        for check in &self.system {
            let mark = if check.good == Some(false) { " MISSING" } else { "" };
            writeln!(f, "here        {}: {}{mark}", check.name, check.found)?;
        }
        if let Some(lists) = &self.lists {
            writeln!(
                f,
                "would list  {} read and {} written frames of {} clean ones",
                lists.frames_read, lists.frames_written, lists.pool_frames_clean
            )?;
            for (reason, count) in &lists.left_out {
                writeln!(f, "left out    {count} frames: {}", reason.words())?;
            }
        }
        for sentence in self.missing.iter().chain(&self.missing_here) {
            writeln!(f, "missing     {sentence}")?;
        }
        match (self.missing.is_empty(), self.missing_here.is_empty()) {
            (true, true) => writeln!(f, "usable"),
            (true, false) => writeln!(f, "not usable here: the build is known, this machine lacks something"),
            _ => writeln!(f, "not usable: nothing would be listed"),
        }
    }
}

impl fmt::Display for FieldReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, catalogue, found } = self;
        let witnesses = found.witnesses.join("; ");
        let doubts = found.doubts.join("; ");
        match (catalogue, found.value) {
            (Some(known), Some(value)) if *known == value => {
                write!(f, "{name} {known:#x}, as found: {witnesses}")
            }
            (Some(known), Some(value)) => {
                write!(f, "{name} {known:#x} CONTRADICTED, found {value:#x}: {witnesses}")
            }
            (Some(known), None) => write!(f, "{name} {known:#x} by the catalogue alone: {doubts}"),
            (None, Some(value)) if found.is_sure() => write!(f, "{name} {value:#x}, derived: {witnesses}"),
            (None, _) => write!(f, "{name} NOT SURE: {doubts}"),
        }
    }
}

impl fmt::Display for FileReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tablespace {}, {}: ", self.space, self.file)?;
        if let Some(reason) = self.left_out {
            return write!(f, "left out: {}", reason.words());
        }
        write!(f, "{} bytes mapped", self.bytes_mapped)?;
        for (reason, bytes) in &self.bytes_left_out {
            write!(f, ", {bytes} {}", reason.words())?;
        }
        write!(f, "; {}", self.disks.join(", "))
    }
}
