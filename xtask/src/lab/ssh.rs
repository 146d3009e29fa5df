//! OpenSSH between the hosts, for whoever wants `xl migrate` as it is: put into a running lab, of whose frozen state it is no part.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Flavour, Host, Lab};
use crate::apt::{Area, unpack};
use crate::cache::{self, Key};
use crate::step::{run, step};

/// What is installed; its dependencies come with it.
const PACKAGES: &[&str] = &["openssh-client", "openssh-server"];

/// Programs of it that are used.
const PROGRAMS: &[&str] = &["usr/bin/ssh", "usr/bin/ssh-keygen", "usr/sbin/sshd"];
/// Where its server has parts of itself, in newer releases.
const PARTS: &str = "usr/lib/openssh";

/// How long one command may take under emulation.
const LIMIT: Duration = Duration::from_secs(120);

/// Port of a server whose sessions have `LIBXL_SAVE_HELPER`, and of one whose sessions have not.
const PORT: u16 = 22;
const PLAIN_PORT: u16 = 2222;

/// The option of `xl migrate` that leads to a server without `LIBXL_SAVE_HELPER`.
pub const PLAIN_TRANSPORT: &str = "-s 'ssh -p 2222'";

/// Puts OpenSSH into both hosts, and starts its server with `helper` as `LIBXL_SAVE_HELPER` of all sessions.
///
/// # Errors
/// When there is no such package, or a server does not start.
pub fn install(lab: &Lab, helper: &str) -> Result<()> {
    let files = files(lab.flavour())?;
    step("putting OpenSSH into both hosts", || {
        for host in Host::BOTH {
            let machine = lab.host(host);
            let names = files.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(" ");
            // What is there belongs to programs that run.
            let command = format!("for i in {names}; do [ -e /$i ] || echo $i; done; mkdir -p /{PARTS}");
            let missing = machine.must(&command, LIMIT)?;
            for (name, path) in files.iter().filter(|(name, _)| missing.lines().any(|line| line == name)) {
                machine.push(path, &format!("/{name}"), 0o755)?;
            }
        }
        Ok(())
    })?;
    let maker = lab.host(Host::Source);
    maker.must(
        "mkdir -p /run/keys && cd /run/keys && rm -f user* host* && ssh-keygen -q -t ed25519 -N '' -f user && \
         ssh-keygen -q -t ed25519 -N '' -f host",
        LIMIT,
    )?;
    let key = |name: &str| maker.pull(&format!("/run/keys/{name}"));
    let public = String::from_utf8(key("host.pub")?)?;
    let names = Host::BOTH.map(|host| format!("{},{}", host.name(), host.address())).join(",");
    let known: String = [PORT, PLAIN_PORT]
        .map(|port| {
            let of_port =
                |name: &str| if port == PORT { name.to_owned() } else { format!("[{name}]:{port}") };
            format!("{} {public}", names.split(',').map(of_port).collect::<Vec<_>>().join(","))
        })
        .concat();
    for host in Host::BOTH {
        let machine = lab.host(host);
        machine.must(
            "mkdir -p /root/.ssh /etc/ssh /run/sshd && chmod 700 /root /root/.ssh && \
             { grep -q ^sshd: /etc/passwd || echo 'sshd:x:100:65534::/run/sshd:/usr/sbin/nologin' >>/etc/passwd; }",
            LIMIT,
        )?;
        machine.write(&key("user")?, "/root/.ssh/id_ed25519", 0o600)?;
        machine.write(&key("user.pub")?, "/root/.ssh/authorized_keys", 0o600)?;
        machine.write(&key("host")?, "/etc/ssh/host_key", 0o600)?;
        machine.write(known.as_bytes(), "/root/.ssh/known_hosts", 0o600)?;
        machine.write(configuration().as_bytes(), "/etc/ssh/lab_config", 0o600)?;
        machine.must(
            &format!(
                "sshd=\"/usr/sbin/sshd -f /etc/ssh/lab_config -E /run/sshd.log\"; \
                 $sshd -p {PORT} -o SetEnv=LIBXL_SAVE_HELPER={helper} && $sshd -p {PLAIN_PORT}"
            ),
            LIMIT,
        )?;
    }
    for host in Host::BOTH {
        for (port, expected) in [(PORT, helper), (PLAIN_PORT, "")] {
            let line =
                format!("ssh -o BatchMode=yes -p {port} {} 'echo $LIBXL_SAVE_HELPER'", host.other().name());
            let words = lab.host(host).must(&line, LIMIT).context("ssh between the hosts")?;
            ensure!(words.trim() == expected, "a session on port {port} has {words:?} as its helper");
        }
    }
    Ok(())
}

/// The server's configuration: what differs between the two servers is on their command lines.
fn configuration() -> String {
    "HostKey /etc/ssh/host_key\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n\
     KbdInteractiveAuthentication no\nUsePAM no\nUseDNS no\nPidFile none\n"
        .to_owned()
}

/// The programs and the libraries that they load: the path in a host, and where the file lies here.
fn files(flavour: Flavour) -> Result<Vec<(String, PathBuf)>> {
    let area = Area::open(flavour.suite())?;
    let packages = area.resolve(PACKAGES)?;
    let mut key = Key::new("lab-ssh-1");
    for package in &packages {
        key = key.with(package.to_string().as_bytes());
    }
    let root = cache::get_or_make("lab-ssh", key, |dir| unpack(&area.download(&packages)?, dir))?;
    let mut programs: Vec<String> = PROGRAMS.iter().map(|&name| name.to_owned()).collect();
    let parts = fs::read_dir(root.join(PARTS)).with_context(|| format!("no {PARTS} in openssh-server"))?;
    for part in parts {
        let name = part?.file_name().to_string_lossy().into_owned();
        if matches!(name.as_str(), "sshd-session" | "sshd-auth") {
            programs.push(format!("{PARTS}/{name}"));
        }
    }
    let mut names = programs.clone();
    for program in &programs {
        // The loader itself says what it would load.
        let mut loader = Command::new("chroot");
        loader.arg(&root).args(["/lib64/ld-linux-x86-64.so.2", "--list"]).arg(Path::new("/").join(program));
        names.extend(libraries(&String::from_utf8_lossy(&run(&mut loader)?)));
    }
    names.sort();
    names.dedup();
    Ok(names.into_iter().map(|name| (name.clone(), root.join(name))).collect())
}

/// The paths in lines of `NAME => PATH (ADDRESS)`.
fn libraries(words: &str) -> Vec<String> {
    let paths = words.lines().filter_map(|line| line.split_once("=> ")?.1.split_whitespace().next());
    paths.map(|path| path.trim_start_matches('/').to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_what_the_loader_finds() {
        let words = "\tlinux-vdso.so.1 (0x00007ffe)\n\tlibcrypto.so.3 => /lib/x86_64-linux-gnu/libcrypto.so.3 (0x00007f)\n\
                     \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(libraries(words), ["lib/x86_64-linux-gnu/libcrypto.so.3"]);
    }

    #[test]
    fn the_other_server_is_the_one_without_the_helper() {
        assert!(PLAIN_TRANSPORT.contains(&PLAIN_PORT.to_string()));
    }
}
