//! Functions and variables by their names in the source: mangled names drift with every argument, the names themselves do not.

use crate::catalogue::{Arguments, Register};
use crate::elf::{Elf, ElfError, Place, ReadAt, Symbol};

use super::SymbolFinding;

/// A function that is probed.
struct Wanted {
    /// The catalogue's field.
    field: &'static str,
    /// Its name in the source, with its class.
    name: &'static str,
    /// Whether it is a method, so that its object is its first argument.
    method: bool,
    /// The type of the argument that the probe reads, as the demangler writes it.
    reads: Option<&'static str>,
}

const FUNCTIONS: [Wanted; 8] = [
    Wanted {
        field: "read_complete",
        name: "buf_page_io_complete",
        method: false,
        reads: Some("buf_page_t*"),
    },
    Wanted { field: "page_create", name: "buf_page_create", method: false, reads: None },
    Wanted {
        field: "page_dirty",
        name: "buf_flush_insert_into_flush_list",
        method: false,
        reads: Some("buf_block_t*"),
    },
    Wanted { field: "page_clean", name: "buf_flush_remove", method: false, reads: Some("buf_page_t*") },
    Wanted {
        field: "frame_free",
        name: "buf_LRU_block_free_non_file_page",
        method: false,
        reads: Some("buf_block_t*"),
    },
    Wanted { field: "file_open", name: "Fil_shard::open_file", method: true, reads: Some("fil_node_t*") },
    Wanted { field: "chunk_allocate", name: "buf_pool_t::allocate_chunk", method: true, reads: None },
    Wanted { field: "chunk_deallocate", name: "buf_pool_t::deallocate_chunk", method: true, reads: None },
];

/// Variables of C linkage or at file scope: their names are not mangled.
const VARIABLES: [(&str, &str); 3] =
    [("pools", "buf_pool_ptr"), ("pool_count", "srv_buf_pool_instances"), ("page_size", "srv_page_size")];

/// The symbols that are needed.
pub(super) struct Names {
    pub symbols: Vec<SymbolFinding>,
    pub arguments: Arguments,
}

impl Names {
    /// The address of a variable or function in the file.
    pub fn address(&self, field: &str) -> Option<u64> {
        self.symbols.iter().find(|symbol| symbol.field == field)?.address
    }
}

/// Looks for all of them.
pub(super) fn find<F: ReadAt + ?Sized>(elf: &Elf<'_, F>) -> Result<Names, ElfError> {
    let bare: Vec<&str> = FUNCTIONS.iter().map(|wanted| last_part(wanted.name)).collect();
    let found = elf.symbols_where(|name| {
        VARIABLES.iter().any(|(_, variable)| variable.as_bytes() == name)
            || (name.starts_with(b"_Z") && bare.iter().any(|bare| contains(name, bare.as_bytes())))
    })?;
    let mut symbols = Vec::new();
    for (field, variable) in VARIABLES {
        let symbol = found.iter().find(|symbol| symbol.name == variable);
        symbols.push(SymbolFinding {
            field,
            symbol: symbol.map(|symbol| symbol.name.clone()),
            called: variable.to_owned(),
            address: symbol.map(|symbol| symbol.address),
            entry: None,
            doubt: symbol.is_none().then(|| "the program has no such symbol".to_owned()),
        });
    }
    let mut arguments = Arguments::OF_PROGRAMS;
    for wanted in &FUNCTIONS {
        let (mut finding, register) = find_function(&found, wanted);
        if let (Some(symbol), Some(address)) = (&finding.symbol, finding.address) {
            let place = elf.probe_place(symbol, Place { address })?;
            let bytes = elf.bytes_at(symbol, place.address, 4)?;
            let bytes = bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
            finding.entry = Some(if place.emulated {
                format!("probed at a push ({bytes}) at +{}: cheap", place.address - address)
            } else {
                format!("begins with {bytes}: single-stepped, ten times dearer")
            });
        }
        if let Some(register) = register {
            let read = match wanted.field {
                "read_complete" => &mut arguments.read_complete,
                "page_dirty" => &mut arguments.page_dirty,
                "page_clean" => &mut arguments.page_clean,
                "frame_free" => &mut arguments.frame_free,
                _ => &mut arguments.file_open,
            };
            if *read != register {
                finding.doubt = Some(format!(
                    "its argument is in {}, but the probes read it in {}",
                    register.name(),
                    read.name()
                ));
            }
            *read = register;
        }
        symbols.push(finding);
    }
    Ok(Names { symbols, arguments })
}

fn find_function(found: &[Symbol], wanted: &Wanted) -> (SymbolFinding, Option<Register>) {
    let named: Vec<(&Symbol, Signature)> = found
        .iter()
        .filter_map(|symbol| Some((symbol, Signature::of(&symbol.name)?)))
        .filter(|(_, signature)| signature.name == wanted.name)
        .collect();
    let mut finding =
        SymbolFinding { field: wanted.field, called: wanted.name.to_owned(), ..SymbolFinding::default() };
    match &named[..] {
        [] => finding.doubt = Some("the program has no such symbol".to_owned()),
        [(symbol, signature)] => {
            finding.called = format!("{}({})", signature.name, signature.parameters.join(", "));
            let register = wanted.reads.map(|kind| signature.register(kind, wanted.method));
            finding.symbol = Some(symbol.name.clone());
            finding.address = Some(symbol.address);
            match register {
                None => {}
                Some(Some(register)) => return (finding, Some(register)),
                Some(None) => {
                    finding.doubt =
                        Some(format!("it takes no {} in a register", wanted.reads.unwrap_or_default()));
                }
            }
        }
        several => {
            let names: Vec<&str> = several.iter().map(|(symbol, _)| symbol.name.as_str()).collect();
            finding.doubt = Some(format!("several functions have the name: {}", names.join(", ")));
        }
    }
    (finding, None)
}

/// A demangled function.
struct Signature {
    name: String,
    parameters: Vec<String>,
}

impl Signature {
    /// `None` for what is no function, or does not demangle.
    fn of(mangled: &str) -> Option<Self> {
        let demangled = cpp_demangle::Symbol::new(mangled).ok()?.demangle().ok()?;
        let (name, rest) = demangled.split_once('(')?;
        let inside = rest.rsplit_once(')')?.0;
        Some(Self { name: name.to_owned(), parameters: split_parameters(inside) })
    }

    /// The register of the first parameter of a type. All that stand before it must be known to take one register each: pointers,
    /// references, and integers.
    fn register(&self, kind: &str, method: bool) -> Option<Register> {
        let index = self.parameters.iter().position(|parameter| parameter == kind)?;
        let plain = ["bool", "int", "unsigned int", "long", "unsigned long", "unsigned char"];
        let known = |parameter: &String| {
            parameter.ends_with('*') || parameter.ends_with('&') || plain.contains(&parameter.as_str())
        };
        let before = self.parameters.get(..index)?;
        let at = index + usize::from(method);
        before.iter().all(known).then(|| Register::ALL.get(at).copied())?
    }
}

/// Splits at commas outside all brackets.
fn split_parameters(text: &str) -> Vec<String> {
    let (mut parameters, mut depth, mut current) = (Vec::new(), 0_i32, String::new());
    for letter in text.chars() {
        match letter {
            '(' | '<' | '[' | '{' => depth += 1,
            ')' | '>' | ']' | '}' => depth -= 1,
            ',' if depth == 0 => {
                parameters.push(current.trim().to_owned());
                current.clear();
                continue;
            }
            _ => {}
        }
        current.push(letter);
    }
    if !current.trim().is_empty() {
        parameters.push(current.trim().to_owned());
    }
    parameters
}

fn last_part(name: &str) -> &str {
    name.rsplit("::").next().unwrap_or(name)
}

/// Whether some bytes lie in others.
pub(super) fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn register(mangled: &str, kind: &str, method: bool) -> Option<Register> {
        Signature::of(mangled)?.register(kind, method)
    }

    #[test]
    fn arguments_are_found_by_their_type() {
        let clean = "_Z16buf_flush_removeP10buf_page_t";
        assert_eq!(register(clean, "buf_page_t*", false), Some(Register::Rdi));
        let dirty = "_Z32buf_flush_insert_into_flush_listP10buf_pool_tP11buf_block_tm";
        assert_eq!(register(dirty, "buf_block_t*", false), Some(Register::Rsi));
        assert_eq!(
            register("_ZN9Fil_shard9open_fileEP10fil_node_t", "fil_node_t*", true),
            Some(Register::Rsi)
        );
        // buf_page_io_complete has had one, two and four arguments.
        for mangled in [
            "_Z20buf_page_io_completeP10buf_page_t",
            "_Z20buf_page_io_completeP10buf_page_tb",
            "_Z20buf_page_io_completeP10buf_page_tbP9IORequestP10fil_node_t",
        ] {
            assert_eq!(register(mangled, "buf_page_t*", false), Some(Register::Rdi));
        }
        // A structure by value may take two registers or none.
        assert_eq!(register("_Z16buf_flush_remove9page_id_tP10buf_page_t", "buf_page_t*", false), None);
        assert_eq!(register("_Z16buf_flush_removev", "buf_page_t*", false), None);
        assert!(Signature::of("not mangled").is_none());
    }

    #[test]
    fn two_functions_of_one_name_are_none() {
        let symbol = |name: &str| Symbol { name: name.to_owned(), address: 16, bytes: 4 };
        let found = [
            symbol("_Z16buf_flush_removeP10buf_page_t"),
            symbol("_Z16buf_flush_removeP10buf_page_tb"),
            symbol("_Z20buf_flush_remove_allP10buf_page_t"),
        ];
        let wanted = &FUNCTIONS[3];
        let (finding, register) = find_function(&found, wanted);
        assert!(finding.symbol.is_none() && register.is_none());
        assert!(finding.doubt.is_some_and(|doubt| doubt.starts_with("several functions")));
        assert!(
            find_function(&found[2..], wanted).0.doubt.is_some_and(|doubt| doubt.contains("no such symbol"))
        );
        assert_eq!(find_function(&found[..1], wanted).1, Some(Register::Rdi));
    }

    #[test]
    fn parameters_are_split_outside_brackets() {
        assert_eq!(split_parameters("a, b<c, d>, e (*)(f, g)"), ["a", "b<c, d>", "e (*)(f, g)"]);
        assert!(split_parameters("").is_empty());
    }
}
