// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"
)

// machine is where, when and on what source the numbers came about.
type machine struct {
	Began                           time.Time
	Cores                           int
	Model, Kernel, Loaded, Revision string
}

func machineNow(ctx context.Context) machine {
	return machine{
		Began: time.Now().UTC(), Cores: runtime.NumCPU(), Model: cpuModel(),
		Kernel: firstLine("/proc/sys/kernel/osrelease"), Loaded: firstLine("/proc/loadavg"), Revision: revision(ctx),
	}
}

func (m machine) lines() []string {
	return []string{
		fmt.Sprintf("machine: %d cores, %s, %s/%s, kernel %s", m.Cores, m.Model, runtime.GOOS, runtime.GOARCH, m.Kernel),
		fmt.Sprintf("source: %s, %s", m.Revision, runtime.Version()),
		fmt.Sprintf("begun %s, load average then %s", m.Began.Format(time.RFC3339), m.Loaded),
	}
}

func cpuModel() string {
	file, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "unknown CPU"
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if name, value, found := strings.Cut(lines.Text(), ":"); found && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown CPU"
}

func firstLine(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	line, _, _ := strings.Cut(string(text), "\n")
	return line
}

// revision is the commit that was measured, marked when the tree had changes; unknown outside of a repository.
func revision(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "git", "--no-optional-locks", "describe", "--always", "--dirty").Output()
	if err != nil {
		return "unknown revision"
	}
	return strings.TrimSpace(string(out))
}
