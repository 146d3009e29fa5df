//! What is known of each build of mysqld: symbols, structure offsets. The data is `catalogue.toml`, keyed by build id, because
//! names and layouts drift from version to version.

use serde::Deserialize;
use thiserror::Error;

use crate::event::Layout;

const BUILT_IN: &str = include_str!("../catalogue.toml");

/// No structure that the catalogue describes is larger than this, in bytes.
const LARGEST_STRUCTURE: usize = 1 << 20;

/// All known builds.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalogue {
    #[serde(rename = "build", default)]
    builds: Vec<Build>,
}

/// One build of mysqld.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Build {
    /// The package that brings it, for messages: name and version.
    pub package: String,
    /// The build id in its ELF file, in hexadecimal.
    pub build_id: String,
    /// Variables that are read.
    pub variables: Variables,
    /// Functions that are probed.
    pub functions: Functions,
    /// `buf_pool_t`.
    pub pool: PoolLayout,
    /// `buf_chunk_t`.
    pub chunk: ChunkLayout,
    /// `buf_block_t`.
    pub block: BlockLayout,
    /// `fil_space_t`.
    pub space: SpaceLayout,
    /// `fil_node_t`.
    pub node: NodeLayout,
    /// Values of enumerations.
    pub values: Values,
}

/// Symbols of variables.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variables {
    /// Pointer to the array of pool instances.
    pub pools: String,
    /// How many instances there are, 8 bytes.
    pub pool_count: String,
    /// Bytes in a page, 8 bytes.
    pub page_size: String,
}

/// Symbols of functions; `guest-probe-ebpf` says what each tells.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // each is named after the eBPF program that probes it
pub struct Functions {
    pub read_complete: String,
    pub page_create: String,
    pub page_dirty: String,
    pub page_clean: String,
    pub frame_free: String,
    pub file_open: String,
    pub chunk_allocate: String,
    pub chunk_deallocate: String,
}

/// Offsets in a pool instance.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolLayout {
    /// Bytes in an instance.
    pub size: usize,
    /// Of the number of chunks, 8 bytes.
    pub chunk_count: usize,
    /// Of the pointer to the array of chunks.
    pub chunks: usize,
}

/// Offsets in a chunk.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkLayout {
    /// Bytes in a chunk's descriptor.
    pub size: usize,
    /// Of the number of control blocks, 8 bytes.
    pub block_count: usize,
    /// Of the pointer to the array of control blocks.
    pub blocks: usize,
}

/// Offsets in a control block.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockLayout {
    /// Bytes in a control block.
    pub size: usize,
    /// Of the tablespace id and, 4 bytes on, the page number.
    pub page_id: usize,
    /// Of the `page_size_t`, 8 bytes.
    pub page_size: usize,
    /// Of the number of threads that use the page, 4 bytes.
    pub fix_count: usize,
    /// Of the kind of I/O that is under way, 1 byte.
    pub io_fix: usize,
    /// Of the block's state, 1 byte.
    pub state: usize,
    /// Of the LSN of the newest change, 8 bytes, 0 when the page was not changed since it was loaded.
    pub newest: usize,
    /// Of the LSN of the oldest change that is not on disk, 8 bytes, 0 when the page is clean.
    pub oldest: usize,
    /// Of the pointer to the tablespace.
    pub space: usize,
    /// Of the tablespace's version when the page was loaded, 4 bytes.
    pub version: usize,
    /// Of the frame's address.
    pub frame: usize,
}

/// Offsets in a tablespace.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpaceLayout {
    /// Of its id, 4 bytes.
    pub id: usize,
    /// Of its version, 4 bytes: pages of an older one are stale.
    pub version: usize,
    /// Of the byte that says it was dropped.
    pub deleted: usize,
    /// Of its flags, 4 bytes, as in page 0 of its file.
    pub flags: usize,
}

/// Offsets in a tablespace's file node.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeLayout {
    /// Of the pointer to the tablespace.
    pub space: usize,
}

/// Values of enumerations.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Values {
    /// State of a block that holds a page of a file.
    pub state_file_page: u8,
    /// No I/O is under way.
    pub io_fix_none: u8,
    /// A read is under way.
    pub io_fix_read: u8,
}

/// Why a catalogue cannot be used, or has no entry.
#[derive(Debug, Error)]
pub enum CatalogueError {
    /// It is not TOML, or lacks or has too many fields.
    #[error("the catalogue cannot be read: {0}")]
    Syntax(#[from] toml::de::Error),
    /// An offset lies outside its structure.
    #[error(
        "catalogue entry {build_id}: offset {offset:#x} ({bytes} bytes) lies outside a {structure} of {size:#x} bytes"
    )]
    Outside {
        /// The entry.
        build_id: String,
        /// The structure.
        structure: &'static str,
        /// The offset.
        offset: usize,
        /// Bytes at the offset.
        bytes: usize,
        /// Bytes in the structure.
        size: usize,
    },
    /// The build is not known.
    #[error(
        "mysqld with build id {build_id} is not in the catalogue, which knows: {known}; \
         an entry needs the structure offsets of that build (guest-probe/catalogue.toml says how they are found)"
    )]
    Unknown {
        /// The build id.
        build_id: String,
        /// The packages that are known.
        known: String,
    },
}

impl Catalogue {
    /// The catalogue that this program was built with.
    ///
    /// # Errors
    /// Never for a program that passed its tests.
    pub fn built_in() -> Result<Self, CatalogueError> {
        Self::parse(BUILT_IN)
    }

    /// Parses and checks a catalogue.
    ///
    /// # Errors
    /// [`CatalogueError::Syntax`] or [`CatalogueError::Outside`].
    pub fn parse(text: &str) -> Result<Self, CatalogueError> {
        let catalogue: Self = toml::from_str(text)?;
        for build in &catalogue.builds {
            build.check()?;
        }
        Ok(catalogue)
    }

    /// The entry of a build.
    ///
    /// # Errors
    /// [`CatalogueError::Unknown`].
    pub fn find(&self, build_id: &str) -> Result<&Build, CatalogueError> {
        self.builds.iter().find(|build| build.build_id == build_id).ok_or_else(|| CatalogueError::Unknown {
            build_id: build_id.to_owned(),
            known: self.builds.iter().map(|build| build.package.as_str()).collect::<Vec<_>>().join(", "),
        })
    }
}

impl Build {
    /// What the eBPF programs need of it.
    pub fn event_layout(&self, wake_at: u32) -> Layout {
        // `check` has held every offset against LARGEST_STRUCTURE, so none is cut off.
        Layout {
            block_page_id: self.block.page_id as u32,
            block_io_fix: self.block.io_fix as u32,
            block_state: self.block.state as u32,
            block_frame: self.block.frame as u32,
            node_space: self.node.space as u32,
            space_id: self.space.id as u32,
            io_fix_read: self.values.io_fix_read,
            state_file_page: self.values.state_file_page,
            reserved: [0; 2],
            wake_at,
        }
    }

    /// Bytes of a `fil_space_t` that hold all fields that are read.
    pub fn space_bytes(&self) -> usize {
        let SpaceLayout { id, version, deleted, flags } = self.space;
        id.max(version).max(deleted).max(flags) + 4
    }

    fn check(&self) -> Result<(), CatalogueError> {
        let check = |structure, size: usize, offset: usize, bytes: usize| {
            let inside =
                size <= LARGEST_STRUCTURE && offset.checked_add(bytes).is_some_and(|end| end <= size);
            inside.then_some(()).ok_or_else(|| CatalogueError::Outside {
                build_id: self.build_id.clone(),
                structure,
                offset,
                bytes,
                size,
            })
        };
        let pool = &self.pool;
        for offset in [pool.chunk_count, pool.chunks] {
            check("buf_pool_t", pool.size, offset, 8)?;
        }
        let chunk = &self.chunk;
        for offset in [chunk.block_count, chunk.blocks] {
            check("buf_chunk_t", chunk.size, offset, 8)?;
        }
        let block = &self.block;
        for (offset, bytes) in [
            (block.page_id, 8),
            (block.page_size, 8),
            (block.fix_count, 4),
            (block.io_fix, 1),
            (block.state, 1),
            (block.newest, 8),
            (block.oldest, 8),
            (block.space, 8),
            (block.version, 4),
            (block.frame, 8),
        ] {
            check("buf_block_t", block.size, offset, bytes)?;
        }
        let space = &self.space;
        for offset in [space.id, space.version, space.deleted, space.flags] {
            check("fil_space_t", LARGEST_STRUCTURE, offset, 4)?;
        }
        check("fil_node_t", LARGEST_STRUCTURE, self.node.space, 8)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_built_in_catalogue_is_sound() {
        let catalogue = Catalogue::built_in().unwrap();
        assert!(!catalogue.builds.is_empty());
        for build in &catalogue.builds {
            assert_eq!(catalogue.find(&build.build_id).unwrap().package, build.package);
            assert!(build.build_id.bytes().all(|digit| digit.is_ascii_hexdigit()));
        }
    }

    #[test]
    fn an_unknown_build_is_named_with_those_that_are_known() {
        let error = Catalogue::built_in().unwrap().find("00ff").unwrap_err().to_string();
        assert!(error.contains("00ff") && error.contains("mysql-server-core"), "{error}");
    }

    #[test]
    fn an_offset_outside_its_structure_is_refused() {
        let text = BUILT_IN.replace("frame = 0x100", "frame = 0x16c");
        assert!(matches!(
            Catalogue::parse(&text),
            Err(CatalogueError::Outside { structure: "buf_block_t", offset: 0x16c, .. })
        ));
        let text = BUILT_IN.replace("frame = 0x100", "frame = 0xfffffffffffffff");
        assert!(Catalogue::parse(&text).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in ".{0,400}") {
            let _ = Catalogue::parse(&text);
        }

        #[test]
        fn a_damaged_catalogue_is_parsed_or_refused(at in 0..BUILT_IN.len(), with in "[ -~]{0,3}") {
            let mut text = BUILT_IN.to_owned();
            if text.is_char_boundary(at) && text.is_char_boundary(at + 1) {
                text.replace_range(at..=at, &with);
                let _ = Catalogue::parse(&text);
            }
        }
    }
}
