//! Docker inside a host, for units that use it, and a registry mirror with a busybox image, so that
//! `docker pull busybox` works with no other network than the cluster's bridge.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::cgroup;
use crate::cluster::Cluster;
use crate::command::outer;
use crate::disk::{put_file, remove_tree};
use crate::host::Host;
use crate::prerequisites::{find_program, need_file};
use crate::state::ProcessId;

/// Where the mirror listens, on the cluster's gateway address.
const MIRROR_PORT: u16 = 5000;

/// nspawn's seccomp filter forbids keyctl(2): runc must not make a session keyring.
const RUNC: &str = r#"#!/bin/sh
# runc with --no-new-keyring after its verb: the container around this host forbids keyctl(2).
n=$#
seen=
while [ "$n" -gt 0 ]; do
    arg=$1
    shift
    set -- "$@" "$arg"
    n=$((n - 1))
    case $seen$arg in
    create | run)
        set -- "$@" --no-new-keyring
        seen=y
        ;;
    esac
done
exec /usr/sbin/runc "$@"
"#;

/// nspawn mounts the old cgroup controllers read-only; again at each boot.
const DROP_IN: &str = r#"[Service]
ExecStartPre=/bin/sh -c 'for c in /sys/fs/cgroup/*/; do if mountpoint -q "$c"; then mount -o remount,rw,bind "$c"; fi; done'
"#;

/// A registry on the cluster's bridge. Ends with the cluster.
#[derive(Clone, Debug)]
pub struct Mirror {
    address: SocketAddr,
}

impl Mirror {
    /// Its address, as Docker's `registry-mirrors` wants it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Cluster {
    /// Starts a registry on the bridge that has one image, `busybox:latest`, made of this machine's
    /// busybox-static. Calling it again gives the one that runs.
    pub fn start_mirror(&self) -> Result<Mirror> {
        need_file("/usr/bin/docker-registry", "docker-registry")?;
        let address: SocketAddr = format!("{}:{MIRROR_PORT}", self.gateway()).parse()?;
        let mirror = Mirror { address };
        let dir = self.dir().join("mirror");
        if dir.exists() && get(address, "/v2/library/busybox/tags/list").is_ok() {
            return Ok(mirror);
        }
        fs::create_dir_all(&dir)?;
        make_image(&dir).context("cannot make the busybox image")?;
        let config = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\nhttp: {{addr: '{address}'}}\n",
            dir.join("storage").display()
        );
        let config_path = dir.join("config.yml");
        fs::write(&config_path, config)?;
        let log = dir.join("log");
        let argv = ["docker-registry", "serve", &config_path.to_string_lossy()];
        let _making = crate::cleanup::making();
        let mut child = cgroup::spawn(&format!("{}-mirror", self.name()), &argv, &[], &log)?;
        let id = ProcessId::of(i32::try_from(child.id())?);
        // A server that is told nothing reports to nobody when it listens: ask until it answers.
        let end = Instant::now() + Duration::from_secs(30);
        while let Err(error) = get(address, "/v2/library/busybox/manifests/latest") {
            if !id.is_some_and(ProcessId::is_alive) || Instant::now() > end {
                let log = fs::read_to_string(&log).unwrap_or_default();
                let _ = child.kill();
                let _ = child.wait();
                bail!("the registry mirror does not answer: {error:#}\n{log}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        // It lives as long as the cluster; its end is collected when that comes.
        std::thread::spawn(move || child.wait());
        Ok(mirror)
    }
}

impl Host {
    /// Starts Docker in the host, also at its later boots; images come from `mirror` only.
    pub fn start_docker(&self, mirror: &Mirror) -> Result<()> {
        need_file("/usr/sbin/dockerd", "docker.io")?;
        need_file("/usr/sbin/runc", "docker.io")?;
        self.write("/usr/local/sbin/runc-in-host", RUNC)?;
        let daemon = serde_json::json!({
            "runtimes": {"in-host": {"path": "/usr/local/sbin/runc-in-host"}},
            "default-runtime": "in-host",
            "registry-mirrors": [mirror.url()],
            // An overlay cannot lie on an overlay.
            "storage-driver": "vfs",
        });
        self.write("/etc/docker/daemon.json", serde_json::to_vec_pretty(&daemon)?)?;
        self.write("/etc/systemd/system/docker.service.d/host.conf", DROP_IN)?;
        let script = "set -e
            chmod 755 /usr/local/sbin/runc-in-host
            systemctl enable --quiet docker.service
            systemctl restart docker.service";
        let started = self.command(["/bin/sh", "-c", script]).deadline(Duration::from_secs(120)).run()?;
        if !started.success() {
            let journal = self.run(["journalctl", "-u", "docker.service", "-n", "30", "--no-pager"])?;
            bail!("{}: docker does not start: {}\n{}", self.name(), started.stderr.trim(), journal.stdout);
        }
        Ok(())
    }
}

/// Writes the image into a registry's storage, in the layout of its file system driver: content under
/// its digest, and link files that name digests.
fn make_image(dir: &Path) -> Result<()> {
    need_file("/bin/busybox", "busybox-static")?;
    let storage = dir.join("storage");
    remove_tree(&storage)?;
    let root = dir.join("image");
    remove_tree(&root)?;
    for sub in ["bin", "etc", "tmp"] {
        fs::create_dir_all(root.join(sub))?;
    }
    put_file(Path::new("/bin/busybox"), &root.join("bin/busybox"), 0o755)?;
    for applet in outer(&["/bin/busybox", "--list"])?.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\n")?;

    let (tar, layer) = (dir.join("layer.tar"), dir.join("layer.tar.gz"));
    let (tar_s, root_s) = (tar.to_string_lossy(), root.to_string_lossy());
    // Same files, same digest, whenever and by whomever it is made.
    let same = ["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"];
    let mut argv = vec!["tar"];
    argv.extend(same);
    argv.extend(["-C", &root_s, "-cf", &tar_s, "."]);
    outer(&argv)?;
    let diff_id = digest(&tar)?;
    outer(&["gzip", "-1", "-n", "-f", &tar_s])?;
    remove_tree(&root)?;

    let repository = storage.join("docker/registry/v2/repositories/library/busybox");
    let blob = |file: &Path| -> Result<(String, u64)> {
        let hex = digest(file)?;
        let data = storage.join(format!("docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]));
        put_file(file, &data, 0o644)?;
        Ok((hex, fs::metadata(file)?.len()))
    };
    let link = |path: String, hex: &str| -> Result<()> {
        let path = repository.join(path);
        fs::create_dir_all(path.parent().context("no parent")?)?;
        Ok(fs::write(&path, format!("sha256:{hex}"))?)
    };

    let (layer_hex, layer_size) = blob(&layer)?;
    let config = serde_json::json!({
        "architecture": architecture()?,
        "os": "linux",
        "config": {
            "Cmd": ["sh"],
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        },
        "created": "1970-01-01T00:00:00Z",
        "history": [{"created": "1970-01-01T00:00:00Z"}],
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{diff_id}")]},
    });
    let config_path = dir.join("config.json");
    fs::write(&config_path, serde_json::to_vec(&config)?)?;
    let (config_hex, config_size) = blob(&config_path)?;
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "size": config_size,
            "digest": format!("sha256:{config_hex}"),
        },
        "layers": [{
            "mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "size": layer_size,
            "digest": format!("sha256:{layer_hex}"),
        }],
    });
    let manifest_path = dir.join("manifest.json");
    fs::write(&manifest_path, serde_json::to_vec(&manifest)?)?;
    let (manifest_hex, _) = blob(&manifest_path)?;
    for hex in [&layer_hex, &config_hex] {
        link(format!("_layers/sha256/{hex}/link"), hex)?;
    }
    link(format!("_manifests/revisions/sha256/{manifest_hex}/link"), &manifest_hex)?;
    link(format!("_manifests/tags/latest/index/sha256/{manifest_hex}/link"), &manifest_hex)?;
    link("_manifests/tags/latest/current/link".into(), &manifest_hex)?;
    fs::remove_file(&layer)?;
    Ok(())
}

/// This machine's architecture in Docker's words.
fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        "x86" => Ok("386"),
        "riscv64" => Ok("riscv64"),
        other => bail!("no Docker name known for the architecture {other}"),
    }
}

/// SHA-256 of a file, in hexadecimal.
fn digest(file: &Path) -> Result<String> {
    let program = find_program("sha256sum").context("sha256sum is missing: install coreutils")?;
    let line = outer(&[program.as_os_str(), file.as_os_str()])?;
    let hex = line.split_ascii_whitespace().next().unwrap_or_default();
    if hex.len() != 64 {
        bail!("sha256sum said {line:?}");
    }
    Ok(hex.to_owned())
}

/// One HTTP GET; an error unless the answer is 200.
fn get(address: SocketAddr, path: &str) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(
        stream,
        "GET {path} HTTP/1.0\r\nHost: {address}\r\n\
         Accept: application/vnd.docker.distribution.manifest.v2+json\r\n\r\n"
    )?;
    let mut head = [0; 64];
    let n = stream.read(&mut head)?;
    let status = String::from_utf8_lossy(&head[..n]).split(' ').nth(1).map(str::to_owned);
    if status.as_deref() != Some("200") {
        bail!("GET {path} answers {}", status.unwrap_or_else(|| "nothing".into()));
    }
    Ok(())
}
