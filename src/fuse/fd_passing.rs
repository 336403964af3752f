//! Messages with descriptors over a socket between the daemon and a helper: single ones, as fusermount3 sends them, and
//! long ones in several pieces.
#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// The descriptors that one message can carry: the kernel refuses more (unix(7), SCM_MAX_FD).
const FDS_PER_PIECE: usize = 253;
/// The bytes of a piece of a long message: far below what a socket buffers, so that one piece never waits for a reader.
const PIECE_BYTES: usize = 32 * 1024;
/// The first piece of a long message: how many bytes and descriptors follow.
const HEADER_BYTES: usize = 8;
/// The longest message: a request or an answer that names thousands of mounts, each by a path.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// The most descriptors of one message: an image, a root, and a file for each of its devices, of which EROFS has at most
/// 65,535. A process that may have fewer open fails by itself.
const MESSAGE_FDS_MAX: usize = 70_000;

/// A message and what came along.
pub(super) struct Message {
    pub(super) bytes: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// Sends `message` in one piece and, with it, copies of `fds`.
fn send(socket: impl AsFd, message: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[] } else { &rights[..] };
    let parts = [IoSlice::new(message)];
    loop {
        let socket = socket.as_fd().as_raw_fd();
        match sendmsg::<()>(socket, &parts, control, MsgFlags::MSG_NOSIGNAL, None) {
            Err(nix::errno::Errno::EINTR) => {}
            sent => return Ok(sent.map(drop)?),
        }
    }
}

/// Receives one piece into `buffer`: its length in bytes, 0 when the other side is gone, and the descriptors that came
/// along. They are closed on exec.
pub(super) fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = nix::cmsg_space!([RawFd; FDS_PER_PIECE]);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            for fd in fds {
                // SAFETY: the kernel has just made this descriptor for this process, and nothing else knows its
                // number, so it is open and owned here alone.
                received.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    if message.flags.contains(MsgFlags::MSG_CTRUNC) {
        // This process may have no more open.
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok((message.bytes, received))
}

/// Sends a message of any length up to [`MESSAGE_BYTES_MAX`] over a socket that keeps the bounds of messages.
pub(super) fn send_message(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if bytes.len() > MESSAGE_BYTES_MAX || fds.len() > MESSAGE_FDS_MAX {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    let length = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
    let header = [length(bytes.len()), length(fds.len())].concat();
    send(&socket, &header, &[])?;
    for piece in bytes.chunks(PIECE_BYTES) {
        send(&socket, piece, &[])?;
    }
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    for piece in fds.chunks(FDS_PER_PIECE) {
        // A message without a byte would look like the end.
        send(&socket, b"+", piece)?;
    }
    Ok(())
}

/// Receives what [`send_message`] sent. `before_wait` is called before each wait for a piece: it can bound it.
pub(super) fn receive_message(
    socket: impl AsFd,
    mut before_wait: impl FnMut() -> io::Result<()>,
) -> io::Result<Message> {
    let mut buffer = vec![0; PIECE_BYTES];
    let mut piece = || loop {
        before_wait()?;
        match receive(&socket, &mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok((0, _)) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            Ok((length, fds)) => return Ok((buffer.get(..length).unwrap_or_default().to_vec(), fds)),
            Err(error) => return Err(error),
        }
    };
    let (header, _) = piece()?;
    let header: [u8; HEADER_BYTES] = header.try_into().map_err(|_| nonsense())?;
    let [b0, b1, b2, b3, f0, f1, f2, f3] = header;
    let length = |bytes| usize::try_from(u32::from_le_bytes(bytes)).map_err(|_| nonsense());
    let (bytes_expected, fds_expected) = (length([b0, b1, b2, b3])?, length([f0, f1, f2, f3])?);
    if bytes_expected > MESSAGE_BYTES_MAX || fds_expected > MESSAGE_FDS_MAX {
        return Err(nonsense());
    }
    let mut message = Message {
        bytes: Vec::new(),
        fds: Vec::new(),
    };
    while message.bytes.len() < bytes_expected {
        message.bytes.extend(piece()?.0);
    }
    while message.fds.len() < fds_expected {
        match piece()? {
            (_, fds) if fds.is_empty() => return Err(nonsense()),
            (_, fds) => message.fds.extend(fds),
        }
    }
    Ok(message)
}

fn nonsense() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it is no message of a helper")
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC;
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
    }

    #[test]
    fn messages_of_any_length_arrive_with_their_descriptors_in_order() {
        let (here, there) = pair();
        let pipes: Vec<_> = (0..600).map(|_| io::pipe().unwrap()).collect();
        let writers: Vec<_> = pipes.iter().map(|(_, writer)| writer.as_fd()).collect();
        let long: Vec<u8> = (0..PIECE_BYTES * 9 + 7).map(|i| (i % 251) as u8).collect();
        let messages: [(&[u8], usize); 4] = [(b"", 0), (b"one", 1), (&long, 600), (b"", 2)];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for (bytes, count) in messages {
                    send_message(&here, bytes, &writers[..count]).unwrap();
                }
            });
            for (bytes, count) in messages {
                let message = receive_message(&there, || Ok(())).unwrap();
                assert!(message.bytes == bytes);
                assert_eq!(message.fds.len(), count);
                for (fd, (reader, _)) in message.fds.into_iter().zip(&pipes) {
                    File::from(fd).write_all(b"x").unwrap();
                    let mut byte = [0];
                    (&mut &*reader).read_exact(&mut byte).unwrap();
                    assert_eq!(&byte, b"x");
                }
            }
        });
        drop(here);
        let end = receive_message(&there, || Ok(())).err().unwrap();
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for header in [
            &b"short"[..],
            b"much too long",
            &[255; HEADER_BYTES],
            &[0, 0, 0, 0, 1, 0, 0, 0],
        ] {
            let (here, there) = pair();
            send(&here, header, &[]).unwrap();
            send(&here, b"+", &[]).unwrap();
            let error = receive_message(&there, || Ok(())).err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{header:?}");
        }
    }
}
