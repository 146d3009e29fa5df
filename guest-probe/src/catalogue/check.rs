//! Whether an entry can be right: names that are names, registers that the probes read, fields inside their structures and not over
//! each other.

use std::collections::HashSet;

use super::{Arguments, Build, CatalogueError};

/// No structure that the catalogue describes is larger than this, in bytes.
const LARGEST_STRUCTURE: usize = 1 << 20;

/// No name is longer: the longest of a function in Debian's mysqld has about 3,000 characters, those that matter under 100.
const LONGEST_NAME: usize = 512;

/// A field of a structure: its name, its offset, its bytes.
type Field = (&'static str, usize, usize);

impl Build {
    /// Checks that the entry can be right.
    ///
    /// # Errors
    /// [`CatalogueError`] for what is wrong first.
    pub fn check(&self) -> Result<(), CatalogueError> {
        let wrong_name = |field, value: &str, what| CatalogueError::Name {
            build_id: cut(&self.build_id),
            field,
            value: cut(value),
            what,
        };
        let is_id = (8..=128).contains(&self.build_id.len())
            && self.build_id.len().is_multiple_of(2)
            && self.build_id.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
        if !is_id {
            return Err(wrong_name("build_id", &self.build_id, "build id (hexadecimal, small letters)"));
        }
        if !is_printable(&self.package) {
            return Err(wrong_name("package", &self.package, "name of a package"));
        }
        let names = self.names();
        for (field, name) in names {
            if !is_printable(name) || name.contains(' ') {
                return Err(wrong_name(field, name, "symbol"));
            }
        }
        let mut seen = HashSet::new();
        if let Some((field, name)) = names.into_iter().find(|(_, name)| !seen.insert(*name)) {
            return Err(wrong_name(field, name, "symbol of its own: another field has it"));
        }
        let read = Arguments::OF_PROGRAMS.named();
        for ((function, says), (_, read)) in self.arguments.named().into_iter().zip(read) {
            if says != read {
                let build_id = self.build_id.clone();
                return Err(CatalogueError::Register { build_id, function, says, read });
            }
        }
        let Self { pool, chunk, block, space, node, values, .. } = self;
        self.check_structure(
            "buf_pool_t",
            pool.size,
            &[("chunk_count", pool.chunk_count, 8), ("chunks", pool.chunks, 8)],
        )?;
        self.check_structure(
            "buf_chunk_t",
            chunk.size,
            &[("block_count", chunk.block_count, 8), ("blocks", chunk.blocks, 8)],
        )?;
        let fields = [
            // Two numbers of 4 bytes.
            ("page_id", block.page_id, 4),
            ("page_id's page number", block.page_id.saturating_add(4), 4),
            // Two words of bit fields.
            ("page_size", block.page_size, 4),
            ("page_size's upper half", block.page_size.saturating_add(4), 4),
            ("fix_count", block.fix_count, 4),
            ("io_fix", block.io_fix, 1),
            ("state", block.state, 1),
            ("newest", block.newest, 8),
            ("oldest", block.oldest, 8),
            ("space", block.space, 8),
            ("version", block.version, 4),
            ("frame", block.frame, 8),
        ];
        self.check_structure("buf_block_t", block.size, &fields)?;
        self.check_structure(
            "fil_space_t",
            LARGEST_STRUCTURE,
            &[
                ("id", space.id, 4),
                ("version", space.version, 4),
                ("deleted", space.deleted, 1),
                ("flags", space.flags, 4),
            ],
        )?;
        self.check_structure("fil_node_t", LARGEST_STRUCTURE, &[("space", node.space, 8)])?;
        if values.io_fix_none == values.io_fix_read {
            return Err(CatalogueError::Values {
                build_id: self.build_id.clone(),
                value: values.io_fix_none,
            });
        }
        Ok(())
    }

    fn check_structure(
        &self,
        structure: &'static str,
        size: usize,
        fields: &[Field],
    ) -> Result<(), CatalogueError> {
        let build_id = || self.build_id.clone();
        for (field, offset, bytes) in fields.iter().copied() {
            let inside =
                size <= LARGEST_STRUCTURE && offset.checked_add(bytes).is_some_and(|end| end <= size);
            if !inside {
                return Err(CatalogueError::Outside { build_id: build_id(), structure, offset, bytes, size });
            }
            if !offset.is_multiple_of(bytes) {
                return Err(CatalogueError::Misaligned {
                    build_id: build_id(),
                    structure,
                    field,
                    offset,
                    bytes,
                });
            }
        }
        for (index, (first, start, bytes)) in fields.iter().enumerate() {
            let over = fields.iter().skip(index + 1).find(|(_, other, other_bytes)| {
                // All ends lie inside the structure, so nothing overflows.
                *start < other + other_bytes && *other < start + bytes
            });
            if let Some((second, _, _)) = over {
                return Err(CatalogueError::Overlap { build_id: build_id(), structure, first, second });
            }
        }
        Ok(())
    }
}

/// Whether a text can be shown on a terminal in one line.
fn is_printable(text: &str) -> bool {
    !text.is_empty() && text.len() <= LONGEST_NAME && text.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}

/// The beginning of a text, for a message.
fn cut(text: &str) -> String {
    text.chars().take(60).collect()
}
