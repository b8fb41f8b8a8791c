//! Where the API is served: on the sockets systemd hands over, else on a unix socket of our own.
//!
//! Opening has two steps, since the first changes the environment and so belongs before any other thread is
//! started: [`open`], then [`Sockets::listeners`] inside the runtime.
//!
//! A socket of our own is replaced only when nobody answers on it, so that a second fleetd never takes the place
//! of a running one; two that start at the same moment are kept apart by a lock that lives as long as the process.
use crate::config::DEFAULT_API_SOCKET;
use crate::lock::LockError;
use listenfd::ListenFd;
use rustix::{
    fd::OwnedFd,
    fs::{FileType, Gid, Mode},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt},
};
use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
};

/// Its members may use the API besides root.
const GROUP: &str = "fleet";
/// As many clients may wait to be accepted; the kernel lowers it to net.core.somaxconn.
const BACKLOG: i32 = 1024;

/// Why the API can't be served.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process listens there.
    #[error("fleetd is already running ({0})")]
    Running(String),
    /// The place is taken by something that is not ours to remove.
    #[error("{path} is there and is no socket; remove it, or set api_socket", path = .0.display())]
    Taken(PathBuf),
    /// systemd handed over something that can't be served on.
    #[error("socket {0} of those handed over by systemd is no listening stream socket (unix or TCP)")]
    Handed(usize),
    /// The system refused.
    #[error("unable to listen on {path}: {step}: {source}", path = .path.display())]
    #[allow(missing_docs)]
    System { path: PathBuf, step: &'static str, source: io::Error },
}

/// The sockets of the API, open but not yet served.
#[derive(Debug)]
pub struct Sockets {
    sockets: Vec<Socket>,
    file: Option<SocketFile>,
    /// What the user should know, for the log.
    pub warnings: Vec<String>,
}

#[derive(Debug)]
enum Socket {
    Unix(std::os::unix::net::UnixListener),
    Tcp(std::net::TcpListener),
}

/// Opens the sockets: those of systemd if there are any (socket activation, sd_listen_fds(3)), else a unix socket
/// at `path`. Takes the variables LISTEN_FDS and LISTEN_PID out of the environment: call it before any thread is
/// started.
pub fn open(path: &Path) -> Result<Sockets, ListenError> {
    let mut handed = ListenFd::from_env();
    if handed.len() == 0 {
        let mut sockets = bind(path, &system_group())?;
        if let Some(file) = sockets.file.as_mut().filter(|_| path == Path::new(DEFAULT_API_SOCKET)) {
            sockets.warnings.extend(file.add_alias(Path::new("/var/run")));
        }
        return Ok(sockets);
    }
    let mut sockets = Sockets { sockets: Vec::new(), file: None, warnings: Vec::new() };
    for index in 0..handed.len() {
        let socket = match handed.take_unix_listener(index) {
            Ok(Some(unix)) => Socket::Unix(unix),
            _ => match handed.take_tcp_listener(index) {
                Ok(Some(tcp)) => Socket::Tcp(tcp),
                _ => return Err(ListenError::Handed(index + 1)),
            },
        };
        sockets.add(socket).map_err(|_| ListenError::Handed(index + 1))?;
    }
    Ok(sockets)
}

impl Sockets {
    fn add(&mut self, socket: Socket) -> io::Result<()> {
        let listens = match &socket {
            Socket::Unix(unix) => {
                unix.set_nonblocking(true).and_then(|()| Ok(sockopt::socket_acceptconn(unix)?))
            }
            Socket::Tcp(tcp) => tcp.set_nonblocking(true).and_then(|()| Ok(sockopt::socket_acceptconn(tcp)?)),
        };
        if !listens? {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if let Socket::Tcp(tcp) = &socket {
            self.warnings.extend(exposed(tcp.local_addr()?));
        }
        self.sockets.push(socket);
        Ok(())
    }

    /// Makes them ready for use in the runtime this is called in. They stay open, and the file of our own stays there, until
    /// this is dropped: keep it until nobody is served any more.
    pub fn listeners(&self) -> io::Result<Vec<Listener>> {
        let listeners = self.sockets.iter().map(|socket| match socket {
            Socket::Unix(unix) => UnixListener::from_std(unix.try_clone()?).map(Listener::Unix),
            Socket::Tcp(tcp) => TcpListener::from_std(tcp.try_clone()?).map(Listener::Tcp),
        });
        listeners.collect()
    }
}

/// The warning about a TCP address that others can reach.
fn exposed(address: SocketAddr) -> Option<String> {
    (!address.ip().is_loopback()).then(|| {
        format!(
            "the API is served on {address} without encryption or authentication: whoever can reach that address \
             can run anything as root on every machine of the cluster; an SSH tunnel (fleetctl --tunnel) needs no \
             such socket"
        )
    })
}

/// The group that may use the socket, if this system has it.
fn system_group() -> Option<Gid> {
    group_id(&fs::read_to_string("/etc/group").unwrap_or_default(), GROUP)
}

/// The number of a group in the text of an /etc/group, group(5).
fn group_id(text: &str, name: &str) -> Option<Gid> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let id = (fields.next() == Some(name)).then(|| fields.nth(1))??;
        id.parse().ok().map(Gid::from_raw)
    })
}

/// Binds a unix socket that only root and the group may connect to.
fn bind(path: &Path, group: &Option<Gid>) -> Result<Sockets, ListenError> {
    let error = |step: &'static str| {
        move |source: Errno| ListenError::System { path: path.to_owned(), step, source: source.into() }
    };
    let lock = lock(path)?;
    let address = SocketAddrUnix::new(path).map_err(error("the path is no name of a socket"))?;
    clear(path, &address)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(error("socket"))?;
    rustix::net::bind(&socket, &address).map_err(error("bind"))?;
    let mut warnings = Vec::new();
    // Owner and mode come before listen: until then nobody can connect, whatever the umask was.
    if group.is_some()
        && let Err(e) = rustix::fs::chown(path, None, *group)
    {
        warnings.push(format!("the group {GROUP} can't use {}: {e}", path.display()));
    }
    rustix::fs::chmod(path, Mode::from_raw_mode(0o660)).map_err(error("chmod"))?;
    rustix::net::listen(&socket, BACKLOG).map_err(error("listen"))?;
    let file = SocketFile::new(path, lock).map_err(|source| ListenError::System {
        path: path.to_owned(),
        step: "stat",
        source,
    })?;
    Ok(Sockets { sockets: vec![Socket::Unix(socket.into())], file: Some(file), warnings })
}

/// Takes the lock beside a socket.
fn lock(path: &Path) -> Result<OwnedFd, ListenError> {
    crate::lock::beside(path).map_err(|error| match error {
        LockError::Held(name) => ListenError::Running(format!("it holds the lock {}", name.display())),
        LockError::System(step, errno) => {
            ListenError::System { path: path.to_owned(), step, source: errno.into() }
        }
    })
}

/// Removes a socket that nobody listens on any more.
fn clear(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let error = |step: &'static str| {
        move |source: Errno| ListenError::System { path: path.to_owned(), step, source: source.into() }
    };
    match rustix::fs::lstat(path) {
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(error("stat")(e)),
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
            return Err(ListenError::Taken(path.to_owned()));
        }
        Ok(_) => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(error("socket"))?;
    match rustix::net::connect(&socket, address) {
        Ok(()) => {
            let who = match sockopt::socket_peercred(&socket).map(|peer| peer.pid.as_raw_nonzero().get()) {
                Ok(1) => "systemd listens on the socket: start fleetd through its service".to_owned(),
                Ok(pid) => format!("process {pid} answers on {}", path.display()),
                Err(_) => format!("somebody answers on {}", path.display()),
            };
            return Err(ListenError::Running(who));
        }
        // Its queue is full: it is alive, but slow.
        Err(Errno::AGAIN) => {
            return Err(ListenError::Running(format!("somebody listens on {}", path.display())));
        }
        Err(Errno::CONNREFUSED | Errno::NOENT) => {}
        Err(e) => return Err(error("connect to the socket that is there")(e)),
    }
    match rustix::fs::unlink(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(error("remove the socket that nobody answers on")(e)),
    }
}

/// The file of a socket we bound ourselves, removed on drop; and the lock that says that we run.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
    alias: Option<PathBuf>,
    _lock: OwnedFd,
}

impl SocketFile {
    fn new(path: &Path, lock: OwnedFd) -> io::Result<Self> {
        let meta = fs::symlink_metadata(path)?;
        Ok(SocketFile { path: path.to_owned(), identity: (meta.dev(), meta.ino()), alias: None, _lock: lock })
    }

    /// The old name of the socket, `/var/run/fleet.sock`, is the same file where /var/run is a link to /run. Where
    /// it is a directory of its own (no systemd made it so), this makes the name a link; says why when it can't.
    fn add_alias(&mut self, directory: &Path) -> Option<String> {
        let same = |other: &Path| {
            fs::canonicalize(other).ok() == self.path.parent().and_then(|p| fs::canonicalize(p).ok())
        };
        if !directory.is_dir() || same(directory) {
            return None;
        }
        let alias = directory.join(self.path.file_name()?);
        match symlink(&self.path, &alias) {
            Ok(()) => self.alias = Some(alias),
            Err(_) if fs::read_link(&alias).is_ok_and(|target| target == self.path) => {
                self.alias = Some(alias)
            }
            Err(e) => {
                return Some(format!(
                    "{} can't be made a link to {}: {e}",
                    alias.display(),
                    self.path.display()
                ));
            }
        }
        None
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody may have removed ours and put another one there.
        let ours =
            fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if !ours {
            return;
        }
        let alias =
            self.alias.iter().filter(|alias| fs::read_link(alias).is_ok_and(|target| target == self.path));
        for path in alias.chain([&self.path]) {
            if let Err(error) = fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "can't remove the socket");
            }
        }
    }
}

/// A socket that clients connect to.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A connection of a client.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Listener {
    /// The next client; safe to cancel. Clients that are gone again are skipped. When the process has no more file
    /// descriptors, which no event tells the end of, it tries again every second.
    pub async fn accept(&self) -> Stream {
        loop {
            let accepted = match self {
                Self::Unix(listener) => listener.accept().await.map(|(stream, _)| Stream::Unix(stream)),
                Self::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
                    // Answers are written whole; waiting to fill packets only delays them.
                    let _ = stream.set_nodelay(true);
                    Stream::Tcp(stream)
                }),
            };
            match accepted {
                Ok(stream) => return stream,
                Err(error) => match error.kind() {
                    io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::Interrupted => {}
                    _ => {
                        tracing::error!(%error, listener = %self.name(), "can't accept a connection");
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                },
            }
        }
    }

    /// The path or address, for the log.
    pub fn name(&self) -> String {
        match self {
            Self::Unix(listener) => {
                match listener.local_addr().ok().and_then(|a| a.as_pathname().map(PathBuf::from)) {
                    Some(path) => path.display().to_string(),
                    None => "a unix socket".to_owned(),
                }
            }
            Self::Tcp(listener) => listener.local_addr().map_or("a TCP socket".to_owned(), |a| a.to_string()),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, data),
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, data),
        }
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, data),
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, data),
        }
    }
    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Unix(stream) => stream.is_write_vectored(),
            Self::Tcp(stream) => stream.is_write_vectored(),
        }
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
        }
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fd::AsFd;
    use std::{
        io::{Read, Write},
        os::unix::net as std_unix,
        process::{Command, Stdio},
    };
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn place() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fleet.sock");
        (directory, path)
    }

    async fn echo(listener: &Listener) {
        let mut stream = listener.accept().await;
        let mut word = [0; 4];
        stream.read_exact(&mut word).await.unwrap();
        stream.write_all(&word).await.unwrap();
        stream.shutdown().await.unwrap();
    }

    async fn ask(path: &Path) -> String {
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(b"ping").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_socket_of_our_own_serves_and_goes() {
        let (_directory, path) = place();
        let sockets = bind(&path, &None).unwrap();
        let listeners = sockets.listeners().unwrap();
        let meta = fs::symlink_metadata(&path).unwrap();
        assert_eq!(meta.mode() & 0o7777, 0o660);
        assert_eq!(listeners[0].name(), path.display().to_string());
        let ((), answer) = tokio::join!(echo(&listeners[0]), ask(&path));
        assert_eq!(answer, "ping");
        // Whoever connects between two uses waits for the second.
        drop(listeners);
        let (asked, answered) = (ask(&path), async { echo(&sockets.listeners().unwrap()[0]).await });
        assert_eq!(tokio::join!(asked, answered).0, "ping");
        drop(sockets);
        assert!(!path.exists());
    }

    #[test]
    fn the_group_may_use_it() {
        let (_directory, path) = place();
        let own = rustix::process::getegid();
        let sockets = bind(&path, &Some(own)).unwrap();
        assert_eq!(sockets.warnings, [""; 0]);
        assert_eq!(fs::symlink_metadata(&path).unwrap().gid(), own.as_raw());
        let text = "root:x:0:\nfleets:x:7:\nfleet:x:994:core,me\nfleet:x:5:\n";
        assert_eq!(group_id(text, "fleet"), Some(Gid::from_raw(994)));
        assert_eq!(group_id(text, "core"), None);
        assert_eq!(group_id("fleet\nfleet:x\nfleet:x:y:\n", "fleet"), None);
    }

    #[test]
    fn a_socket_left_behind_is_replaced() {
        let (_directory, path) = place();
        drop(std_unix::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let sockets = bind(&path, &None).unwrap();
        std_unix::UnixStream::connect(&path).unwrap();
        drop(sockets);
    }

    #[test]
    fn a_running_one_is_left_alone() {
        let (_directory, path) = place();
        let first = bind(&path, &None).unwrap();
        let second = bind(&path, &None).unwrap_err().to_string();
        assert!(second.starts_with("fleetd is already running ("), "{second}");
        std_unix::UnixStream::connect(&path).unwrap();
        drop(first);
        bind(&path, &None).unwrap();
    }

    #[test]
    fn somebody_else_who_listens_is_left_alone_and_named() {
        let (_directory, path) = place();
        let other = std_unix::UnixListener::bind(&path).unwrap();
        let error = bind(&path, &None).unwrap_err().to_string();
        let expected = format!(
            "fleetd is already running (process {} answers on {})",
            std::process::id(),
            path.display()
        );
        assert_eq!(error, expected);
        drop(other);
        bind(&path, &None).unwrap();
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let (directory, path) = place();
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path, &None), Err(ListenError::Taken(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        let missing = bind(&directory.path().join("no/such/place"), &None).unwrap_err().to_string();
        assert!(missing.contains("no/such/place: open the lock file beside it: No such file"), "{missing}");
        let long = bind(&directory.path().join("x".repeat(120)), &None).unwrap_err().to_string();
        assert!(long.contains("the path is no name of a socket"), "{long}");
    }

    #[test]
    fn a_socket_that_took_our_place_is_not_removed() {
        let (_directory, path) = place();
        let sockets = bind(&path, &None).unwrap();
        fs::remove_file(&path).unwrap();
        // The number of the removed file may be given to the next, unless something else takes it first.
        let _decoy = fs::File::create(path.with_extension("decoy")).unwrap();
        let _other = std_unix::UnixListener::bind(&path).unwrap();
        drop(sockets);
        assert!(path.exists());
    }

    #[test]
    fn the_old_name_is_a_link_where_it_must_be() {
        let (directory, path) = place();
        let old = directory.path().join("var-run");
        fs::create_dir(&old).unwrap();
        let mut sockets = bind(&path, &None).unwrap();
        let file = sockets.file.as_mut().unwrap();
        assert_eq!(file.add_alias(&directory.path().join("missing")), None);
        assert_eq!(file.add_alias(directory.path()), None);
        assert_eq!(file.alias, None);
        assert_eq!(file.add_alias(&old), None);
        std_unix::UnixStream::connect(old.join("fleet.sock")).unwrap();
        // Left by one that was killed.
        file.alias = None;
        assert_eq!(file.add_alias(&old), None);
        drop(sockets);
        assert!(fs::symlink_metadata(old.join("fleet.sock")).is_err());

        fs::write(old.join("fleet.sock"), "precious").unwrap();
        let mut sockets = bind(&path, &None).unwrap();
        let warning = sockets.file.as_mut().unwrap().add_alias(&old).unwrap();
        assert!(warning.contains("can't be made a link"), "{warning}");
        drop(sockets);
        assert_eq!(fs::read_to_string(old.join("fleet.sock")).unwrap(), "precious");
    }

    #[test]
    fn addresses_others_can_reach_are_warned_about() {
        for (address, warned) in [
            ("127.0.0.1:49153", false),
            ("[::1]:49153", false),
            ("0.0.0.0:49153", true),
            ("[::]:49153", true),
            ("10.0.0.1:49153", true),
        ] {
            let warning = exposed(address.parse().unwrap());
            assert_eq!(warning.is_some(), warned, "{address}");
            assert!(warning.is_none_or(|text| text.contains(address)));
        }
    }

    /// Not a test of its own: the process that [`sockets_from_systemd`] hands sockets to.
    #[test]
    #[ignore = "run by sockets_from_systemd"]
    fn child_with_sockets() {
        let path = Path::new("/nowhere/at/all");
        let sockets = match open(path) {
            Ok(sockets) => sockets,
            Err(e) => {
                eprintln!("error: {e}");
                return;
            }
        };
        assert!(std::env::var_os("LISTEN_FDS").is_none());
        for warning in &sockets.warnings {
            eprintln!("warning: {warning}");
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            assert!(sockets.file.is_none());
            let listeners = sockets.listeners().unwrap();
            for listener in &listeners {
                echo(listener).await;
            }
        });
    }

    /// Starts [`child_with_sockets`] with sockets as systemd does: from descriptor 3 on, and LISTEN_FDS, LISTEN_PID.
    fn hand_over(first: impl AsFd, second: impl AsFd) -> std::process::Child {
        let dup = |fd: rustix::fd::BorrowedFd<'_>| Stdio::from(rustix::io::dup(fd).unwrap());
        Command::new("/bin/sh")
            .arg("-c")
            .arg("export LISTEN_FDS=2 LISTEN_PID=$$; exec \"$0\" --exact --ignored listen::tests::child_with_sockets --nocapture 3<&0 4>&1 >&2 </dev/null")
            .arg(std::env::current_exe().unwrap())
            .stdin(dup(first.as_fd()))
            .stdout(dup(second.as_fd()))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    #[test]
    fn sockets_from_systemd() {
        let (_directory, path) = place();
        let unix = std_unix::UnixListener::bind(&path).unwrap();
        let tcp = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        let child = hand_over(&unix, &tcp);
        let mut streams: [Box<dyn ReadWrite>; 2] = [
            Box::new(std_unix::UnixStream::connect(&path).unwrap()),
            Box::new(std::net::TcpStream::connect(("127.0.0.1", port)).unwrap()),
        ];
        drop((unix, tcp));
        for stream in &mut streams {
            stream.write_all(b"ping").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "ping");
        }
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{text}");
        assert!(text.contains(&format!("warning: the API is served on 0.0.0.0:{port} without")), "{text}");
        assert!(path.exists(), "the socket of systemd is not ours to remove");
    }

    trait ReadWrite: Read + Write {}
    impl<T: Read + Write> ReadWrite for T {}

    #[test]
    fn something_else_from_systemd() {
        let (_directory, path) = place();
        let unix = std_unix::UnixListener::bind(&path).unwrap();
        let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let output = hand_over(&unix, &datagrams).wait_with_output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(
            text.contains("error: socket 2 of those handed over by systemd is no listening stream"),
            "{text}"
        );
        // A connection is no listener.
        let connection = std_unix::UnixStream::connect(&path).unwrap();
        let output = hand_over(&connection, &unix).wait_with_output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("error: socket 1 of those handed over by systemd"), "{text}");
    }
}
