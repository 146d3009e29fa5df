//! What is in the file that a guest loads.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::build::module::{self, Signer, layout};
use crate::lab::Kernel;
use crate::step::run;

/// What stands at the end of a signed module (`scripts/sign-file.c`).
const SIGNED: &[u8] = b"~Module signature appended~\n";
/// Bytes of `struct module_signature` before it (`include/linux/module_signature.h`); the last four are the signature's length, big-endian.
const SIGNATURE_INFO: usize = 12;

/// Checks what `modinfo` of the kernel's own suite says of the module: every field that belongs there, and none besides; and that a
/// signature holds for the module as it is, and for no other.
///
/// # Errors
/// The first thing that is not as it should be.
pub fn check(kernel: &Kernel, module: &Path) -> Result<()> {
    check_fields(&modinfo(kernel, &fs::read(module)?)?, &kernel.release)?;
    eprintln!("  pass modinfo is complete: poolskip.ko {} for {}", layout::VERSION, kernel.release);
    check_signature(kernel, module)?;
    eprintln!("  pass a signature by the kernel's own tool holds for this module, and for no other");
    Ok(())
}

fn modinfo(kernel: &Kernel, module: &[u8]) -> Result<String> {
    let work = tempfile::tempdir().context("cannot make a temporary directory")?;
    fs::write(work.path().join("poolskip.ko"), module)?;
    kernel.run_inside(work.path(), &["modinfo", "/mnt/poolskip.ko"])
}

/// Signs with a key that is made for it, and lets openssl look at the result.
fn check_signature(kernel: &Kernel, module: &Path) -> Result<()> {
    let work = tempfile::tempdir().context("cannot make a temporary directory")?;
    let (key, certificate) = (work.path().join("key.pem"), work.path().join("certificate.pem"));
    run(Command::new("openssl")
        .args(["req", "-new", "-x509", "-newkey", "rsa:2048", "-sha256", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=Poolskip test", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate))?;
    let signed = module::sign(kernel, module, &Signer { key: &key, certificate: &certificate })?;
    let words = modinfo(kernel, &signed)?;
    ensure!(words.contains("Poolskip test"), "modinfo does not name the signer:\n{words}");
    let (content, signature) = take_signature(&signed).context("the module has no signature at its end")?;
    ensure!(content == fs::read(module)?, "signing has changed the module itself");
    let verify = |content: &[u8]| -> Result<()> {
        let (data, detached) = (work.path().join("data"), work.path().join("signature"));
        fs::write(&data, content)?;
        fs::write(&detached, signature)?;
        let mut openssl = Command::new("openssl");
        openssl.args([
            "cms",
            "-verify",
            "-binary",
            "-noverify",
            "-inform",
            "DER",
            "-out",
            "/dev/null",
            "-in",
        ]);
        openssl.arg(&detached).arg("-content").arg(&data).arg("-certfile").arg(&certificate);
        run(&mut openssl).map(drop)
    };
    verify(content)?;
    let mut other = content.to_vec();
    if let Some(byte) = other.last_mut() {
        *byte ^= 1;
    }
    ensure!(verify(&other).is_err(), "the signature holds for another module too");
    Ok(())
}

/// A signed module without its signature, and the signature (CMS, DER).
fn take_signature(module: &[u8]) -> Option<(&[u8], &[u8])> {
    let rest = module.strip_suffix(SIGNED)?;
    let (rest, info) = rest.split_at_checked(rest.len().checked_sub(SIGNATURE_INFO)?)?;
    let length = u32::from_be_bytes(*info.last_chunk()?) as usize;
    rest.split_at_checked(rest.len().checked_sub(length)?)
}

fn check_fields(words: &str, release: &str) -> Result<()> {
    let fields: Vec<(&str, &str)> = words
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name, value.trim()))
        .collect();
    let value = |name: &str| fields.iter().find(|(found, _)| *found == name).map(|(_, value)| *value);
    for (name, expected) in [
        ("license", "GPL"),
        ("author", "Poolskip"),
        ("version", layout::VERSION),
        ("name", "poolskip"),
        ("depends", ""),
        ("retpoline", "Y"),
    ] {
        ensure!(
            value(name) == Some(expected),
            "modinfo has {name}: {:?}, expected {expected:?}",
            value(name)
        );
    }
    ensure!(value("description").is_some_and(|text| !text.is_empty()), "modinfo has no description");
    ensure!(
        value("vermagic").is_some_and(|magic| magic.split(' ').next() == Some(release)),
        "modinfo has vermagic: {:?}, the kernel is {release}",
        value("vermagic")
    );
    let known = [
        "filename",
        "license",
        "author",
        "description",
        "version",
        "srcversion",
        "name",
        "depends",
        "retpoline",
        "vermagic",
    ];
    let stray = fields.iter().find(|(name, _)| !known.contains(name));
    ensure!(stray.is_none(), "modinfo has a field that should not be there: {stray:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modinfo() -> String {
        format!(
            "filename:       /mnt/poolskip.ko\nversion:        {}\ndescription:    Does things\n\
             author:         Poolskip\nlicense:        GPL\nsrcversion:     ABC\ndepends:        \nretpoline:      Y\n\
             name:           poolskip\nvermagic:       6.1.0-1-amd64 SMP preempt mod_unload modversions \n",
            layout::VERSION
        )
    }

    #[test]
    fn a_field_that_is_missing_wrong_or_stray_is_named() {
        let good = modinfo();
        check_fields(&good, "6.1.0-1-amd64").unwrap();
        for (from, to, named) in [
            ("author:         Poolskip", "author:         Somebody", "author"),
            ("description:    Does things\n", "", "description"),
            ("license:        GPL", "license:        Proprietary", "license"),
            ("name:           poolskip\n", "name:           poolskip\nparm:           x:y\n", "parm"),
            ("6.1.0-1-amd64", "6.1.0-2-amd64", "vermagic"),
        ] {
            let error = check_fields(&good.replace(from, to), "6.1.0-1-amd64").unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn a_signature_is_cut_off_by_its_own_length() {
        let info = [0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 3];
        let signed = [b"module".as_slice(), b"sig", &info, SIGNED].concat();
        assert_eq!(take_signature(&signed), Some((b"module".as_slice(), b"sig".as_slice())));
        assert_eq!(take_signature(b"module"), None);
        assert_eq!(take_signature(SIGNED), None);
        let too_long = [&[0xff; SIGNATURE_INFO], SIGNED].concat();
        assert_eq!(take_signature(&too_long), None);
    }
}
