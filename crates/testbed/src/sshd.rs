//! sshd inside a host, with a key made for the cluster and a user to log in as.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::command::outer;
use crate::host::Host;
use crate::prerequisites::need_file;

/// The user that `fleetctl ssh` logs in as unless told otherwise.
const USER: &str = "core";

/// No passwords, no PAM: what this machine has set up for its own sshd plays no part.
const CONFIG: &str = "\
Port 22
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PrintMotd no
MaxStartups 100
Subsystem sftp internal-sftp
";

impl Host {
    /// Starts sshd in the host, also at its later boots. Root and the user `core`, made here, can log
    /// in with the cluster's key; returns the path of the private key on this machine.
    pub fn start_sshd(&self) -> Result<PathBuf> {
        need_file("/usr/sbin/sshd", "openssh-server")?;
        need_file("/usr/bin/ssh-keygen", "openssh-client")?;
        let key = self.cluster_dir()?.join("id_ed25519");
        if !key.exists() {
            let path = key.to_string_lossy();
            let comment = format!("key of cluster {}", self.cluster_name());
            outer(&["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", &comment, "-f", &path])?;
        }
        let public =
            std::fs::read_to_string(key.with_extension("pub")).context("cannot read the public key")?;
        self.write("/etc/ssh/sshd_config", CONFIG)?;
        self.write("/root/.ssh/authorized_keys", &public)?;
        self.write("/home/core/.ssh/authorized_keys", &public)?;
        // A password that nothing matches, instead of a locked one, which sshd refuses for keys too.
        let script = format!(
            "set -e
            id {USER} >/dev/null 2>&1 || useradd --shell /bin/bash --password '*' --no-create-home {USER}
            chmod 700 /root/.ssh /home/{USER}/.ssh
            chown -R {USER}: /home/{USER}
            [ -e /etc/ssh/ssh_host_ed25519_key ] || ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
            mkdir -p /run/sshd
            systemctl enable --quiet ssh.service
            systemctl restart ssh.service"
        );
        self.sh(&script)?.ok().with_context(|| format!("{}: cannot start sshd", self.name()))?;
        Ok(key)
    }
}
