// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

const (
	graceful = 20 * time.Second // for what was asked to end
	reaping  = 3 * time.Second  // for what was killed
)

// A command is a program to keep running.
type command struct {
	Name string
	Path string
	Args []string
	Env  []string // added to the demo's own
}

// A process is a started command, at the head of a process group of its own.
type process struct {
	name string
	log  string
	pid  int           // also the id of the process group
	done chan struct{} // closed when the process has ended and was waited for
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// A supervisor starts processes and ends them, with everything they started. It belongs to one goroutine, whose thread
// must live as long as the program: on Linux the kernel ends the processes when that thread is gone.
type supervisor struct {
	dir   string // working directory of the processes and place of their logs
	procs []*process
	died  chan *process // those that ended by themselves
}

func newSupervisor(dir string) *supervisor {
	return &supervisor{dir: dir, died: make(chan *process, 16)}
}

func (s *supervisor) start(ctx context.Context, c command) error {
	logPath := filepath.Join(s.dir, c.Name+".log")
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("log of %s: %w", c.Name, err)
	}
	defer log.Close()
	// The context is not the one that ends it: stop does, in order.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), c.Path, c.Args...) //nolint:gosec // the demo's own programs
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, log, log
	cmd.Env = append(os.Environ(), c.Env...)
	// A group of its own: a Ctrl-C at the terminal reaches the demo alone, and one kill reaches all of the group.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	endWithParent(cmd.SysProcAttr)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", c.Name, err)
	}
	p := &process{name: c.Name, log: logPath, pid: cmd.Process.Pid, done: make(chan struct{})}
	s.procs = append(s.procs, p)
	go func() {
		cmd.Wait() //nolint:errcheck // how it ended stands in its log
		close(p.done)
		s.died <- p
	}()
	return nil
}

// until asks ok again and again until it returns nil, for at most limit. It gives up when a process has ended.
func (s *supervisor) until(ctx context.Context, what string, limit time.Duration, ok func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("%s took more than %v", what, limit))
	defer cancel()
	for {
		err := ok(ctx)
		if err == nil {
			return nil
		}
		if i := slices.IndexFunc(s.procs, (*process).ended); i >= 0 {
			return s.procs[i].failure()
		}
		if !wait(ctx, 100*time.Millisecond) {
			if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
				return fmt.Errorf("%w: %w (logs in %s)", cause, err, s.dir)
			}
			return context.Cause(ctx)
		}
	}
}

// failure says that p ended by itself, with the end of its log.
func (p *process) failure() error {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return fmt.Errorf("%s ended by itself", p.name)
	}
	const tail = 600
	return fmt.Errorf("%s ended by itself; the end of %s:\n%s", p.name, p.log, text[max(0, len(text)-tail):])
}

// stop ends all processes, the last one started first, and returns the names of those of which anything is left. When
// ctx ends it stops being polite.
func (s *supervisor) stop(ctx context.Context) (left []string) {
	ctx, cancel := context.WithTimeout(ctx, graceful)
	defer cancel()
	for _, p := range slices.Backward(s.procs) {
		// The head of the group alone: it knows in which order its own children are to end.
		syscall.Kill(p.pid, syscall.SIGTERM) //nolint:errcheck // it may have ended already
	}
	for _, p := range s.procs {
		select {
		case <-p.done:
		case <-ctx.Done():
		}
	}
	for _, p := range s.procs {
		if !p.vanish(context.WithoutCancel(ctx)) { // it must be tried however impatient the user is
			left = append(left, p.name)
		}
	}
	s.procs = nil
	return left
}

// vanish kills what is left of the group and reports whether nothing remains.
func (p *process) vanish(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, reaping)
	defer cancel()
	for signalGroup(p.pid, syscall.SIGKILL) {
		if !wait(ctx, 20*time.Millisecond) {
			return false
		}
	}
	return true
}

// signalGroup reports whether the process group exists.
func signalGroup(pgid int, sig syscall.Signal) bool {
	return !errors.Is(syscall.Kill(-pgid, sig), syscall.ESRCH)
}
