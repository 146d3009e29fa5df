//! A xenstore whose nodes are the files below a directory.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Serves on a socket until the test ends.
pub fn serve(socket: &Path, root: &Path) {
    let listener = UnixListener::bind(socket).unwrap();
    let root = root.to_owned();
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let root = root.clone();
            std::thread::spawn(move || attend(connection, &root));
        }
    });
}

fn attend(mut connection: UnixStream, root: &Path) -> Option<()> {
    loop {
        let mut header = [0; 16];
        connection.read_exact(&mut header).ok()?;
        let number = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; number(12) as usize];
        connection.read_exact(&mut body).ok()?;
        let end = body.iter().position(|&byte| byte == 0).unwrap();
        let path = root.join(std::str::from_utf8(&body[..end]).unwrap().trim_start_matches('/'));
        let answer = match number(0) {
            1 => names(&path),
            2 => fs::read(&path).ok(),
            11 => write(&path, &body[end + 1..]),
            _ => None,
        };
        let (kind, answer) = answer.map_or((16, b"ENOENT\0".to_vec()), |answer| (number(0), answer));
        let mut reply = kind.to_ne_bytes().to_vec();
        reply.extend_from_slice(&header[4..12]);
        reply.extend((answer.len() as u32).to_ne_bytes());
        reply.extend(answer);
        connection.write_all(&reply).ok()?;
    }
}

fn names(path: &PathBuf) -> Option<Vec<u8>> {
    let entries = fs::read_dir(path).ok()?;
    Some(entries.flatten().flat_map(|entry| [entry.file_name().as_encoded_bytes(), b"\0"].concat()).collect())
}

fn write(path: &Path, value: &[u8]) -> Option<Vec<u8>> {
    fs::create_dir_all(path.parent()?).ok()?;
    fs::write(path, value).ok()?;
    Some(b"OK\0".to_vec())
}
