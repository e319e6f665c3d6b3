// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// PoolOptions describe a pool of engines in one process.
type PoolOptions struct {
	Prefill int // engines named prefill-0, … with role prefill
	Decode  int // decode-0, … with role decode
	Both    int // both-0, … with role prefill-decode; with no roles at all the pool is Plain
	Plain   int // engine-0, … without a role

	Encode              int // encode-0, … with role encode
	EncodePrefill       int // encode-prefill-0, … with role encode-prefill
	EncodePrefillDecode int // encode-prefill-decode-0, … with that role

	Host     string  // address to listen on; default 127.0.0.1
	BasePort int     // the first engine's port, the others follow; 0 takes free ports
	Template Options // of every engine; Name, Role, Addr and Peers are set by the pool, ports of SidePort and KVEvents are the first engine's

	// RankPorts gives each of the Template's data-parallel ranks a port and an engine of its own, named
	// prefill-0-rank-0, …, as servers without a balancer inside have them.
	RankPorts bool

	// Of the endpoints file.
	EndpointsFile string // written by RunPool and removed at its end; "" writes none
	Namespace     string // default "default"
}

// Pool is engines that can pull KV from each other.
type Pool struct {
	opts    PoolOptions
	engines []*Engine
}

// NewPool checks o and makes the engines. It starts nothing.
func NewPool(o PoolOptions) (*Pool, error) {
	orDefault(&o.Host, "127.0.0.1")
	orDefault(&o.Namespace, "default")
	if err := o.check(); err != nil {
		return nil, fmt.Errorf("simulated pool: %w", err)
	}
	p := &Pool{opts: o}
	peers := NewRegistry()
	ranks := o.rankEngines()
	if o.RankPorts {
		o.Template.Ranks = 1
	}
	for _, g := range o.groups() {
		for i := range g.n * ranks {
			one := o.Template
			one.Name, one.Role, one.Peers = g.name+"-"+strconv.Itoa(i/ranks), g.role, peers
			if o.RankPorts {
				one.Name += "-rank-" + strconv.Itoa(i%ranks)
			}
			port := 0
			if o.BasePort > 0 {
				port = o.BasePort + len(p.engines)
			}
			before := len(p.engines) * max(one.Ranks, 1)
			one.KVEvents.Endpoint, one.KVEvents.Replay = shifted(one.KVEvents.Endpoint, before), shifted(one.KVEvents.Replay, before)
			if one.SidePort > 0 {
				one.SidePort += len(p.engines)
			}
			one.Addr = net.JoinHostPort(o.Host, strconv.Itoa(port))
			e, err := New(one)
			if err != nil {
				return nil, err // the others are like it
			}
			p.engines = append(p.engines, e)
		}
	}
	return p, nil
}

// engineGroup is the engines of one role.
type engineGroup struct {
	flag, name, role string
	n                int
}

func (o PoolOptions) groups() []engineGroup {
	return []engineGroup{
		{"--prefill", "prefill", phasePrefill, o.Prefill},
		{"--decode", "decode", phaseDecode, o.Decode},
		{"--both", "both", "prefill-decode", o.Both},
		{"--plain", "engine", "", o.Plain},
		{"--encode", "encode", roleEncode, o.Encode},
		{"--encode-prefill", "encode-prefill", roleEncodePrefill, o.EncodePrefill},
		{"--encode-prefill-decode", "encode-prefill-decode", roleEncodeAll, o.EncodePrefillDecode},
	}
}

// rankEngines is how many engines make one of the pool's.
func (o PoolOptions) rankEngines() int {
	if !o.RankPorts {
		return 1
	}
	return max(o.Template.Ranks, 1)
}

// maxEngines is how many engines one pool may have: each has a port.
const maxEngines = 65535

// check refuses what no pool can be made of; what is wrong with the engines themselves, [New] says.
func (o PoolOptions) check() error {
	var errs []error
	total, low := 0, 0
	for _, g := range o.groups() {
		if g.n < 0 || g.n > maxEngines {
			errs = append(errs, fmt.Errorf("%s: %d engines, must be from 0 to %d", g.flag, g.n, maxEngines))
		}
		total, low = total+g.n, min(low, g.n)
	}
	if total == 0 && low == 0 {
		errs = append(errs, errors.New("no engines: set --prefill, --decode, --both or --plain"))
	}
	if o.RankPorts && o.Template.Ranks > maxRanks {
		errs = append(errs, fmt.Errorf("--data-parallel-size: %d, must be from 1 to %d", o.Template.Ranks, maxRanks))
	}
	errs = append(errs, o.Template.KVEvents.checkApart(total*max(o.Template.Ranks, 1)))
	total *= o.rankEngines()
	if o.BasePort < 0 || o.BasePort > 0 && o.BasePort+max(total, 1)-1 > 65535 {
		errs = append(errs, fmt.Errorf("--base-port: %d, must be 0 or leave %d ports up to 65535", o.BasePort, max(total, 1)))
	}
	if _, err := netip.ParseAddr(o.Host); err != nil {
		errs = append(errs, fmt.Errorf("--host: %q, must be an IP address", o.Host))
	}
	return errors.Join(errs...)
}

// Start starts every engine, or none.
func (p *Pool) Start() error {
	for _, e := range p.engines {
		if err := e.Start(); err != nil {
			return errors.Join(err, p.Close())
		}
	}
	return nil
}

// Close ends every engine.
func (p *Pool) Close() error {
	errs := make([]error, 0, len(p.engines))
	for _, e := range p.engines {
		errs = append(errs, e.Close())
	}
	return errors.Join(errs...)
}

// Engines are the pool's engines: prefill first, then decode, both, plain, and those that encode.
func (p *Pool) Engines() []*Engine { return p.engines }

// Engine returns the engine of that name, nil when there is none.
func (p *Pool) Engine(name string) *Engine {
	for _, e := range p.engines {
		if e.Name() == name {
			return e
		}
	}
	return nil
}

// WriteEndpoints writes the file that llm-d's file-discovery and Baton read. The file appears at once, whole.
func (p *Pool) WriteEndpoints(path string) error {
	var b strings.Builder
	b.WriteString("# Written by baton simulate.\nendpoints:\n")
	for _, e := range p.engines {
		a := e.Addr()
		fmt.Fprintf(&b, "- name: %s\n  namespace: %s\n  address: %q\n  port: \"%d\"\n  labels:\n%s", e.Name(), p.opts.Namespace, a.Addr(), a.Port(),
			e.labelLines("    "))
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".endpoints-*")
	if err != nil {
		return fmt.Errorf("endpoints file: %w", err)
	}
	_, err = tmp.WriteString(b.String())
	err = errors.Join(err, tmp.Chmod(0o644), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("endpoints file: %w", err), os.Remove(tmp.Name()))
	}
	return nil
}

// RunPool starts a pool, writes its endpoints file, and serves until ctx ends. It returns after everything has ended.
func RunPool(ctx context.Context, o PoolOptions, logger *slog.Logger) error {
	if o.Template.Logger == nil {
		o.Template.Logger = logger
	}
	p, err := NewPool(o)
	if err != nil {
		return err
	}
	if err := p.Start(); err != nil { //nolint:contextcheck // binding a loopback port needs no context; ctx ends the pool below
		return err
	}
	if o.EndpointsFile != "" {
		if err := p.WriteEndpoints(o.EndpointsFile); err != nil {
			return errors.Join(err, p.Close())
		}
	}
	<-ctx.Done()
	err = p.Close()
	if o.EndpointsFile != "" {
		err = errors.Join(err, os.Remove(o.EndpointsFile))
	}
	return err
}
