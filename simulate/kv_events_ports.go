// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"

	"github.com/baton-epp/baton/simulate/zmtp"
)

// eventAddrs are where one rank publishes its KV events and answers replay requests.
type eventAddrs struct{ events, replay netip.AddrPort }

// openEvents opens the ports of every rank's KV events: those that the engine had before, where it is a restart.
func (p *process) openEvents() error {
	o := p.e.opts.KVEvents
	if o.Endpoint == "" {
		return nil
	}
	p.e.mu.Lock()
	kept := p.e.eventAddrs
	p.e.mu.Unlock()
	bound := make([]eventAddrs, len(p.ranks))
	for r, q := range p.ranks {
		var had eventAddrs
		if kept != nil {
			had = kept[r]
		}
		v := &kvEvents{
			opts: o, size: p.e.opts.BlockSize, rank: r, root: rootHash(p.e.opts.HashSeed), faults: &p.e.faults,
			held: map[int32]blockHash{}, evicted: map[int32]blockHash{}, leaving: map[blockHash]int32{}, parked: map[blockHash]int{},
			topic: []byte(strings.NewReplacer("{addr}", p.addr.String(), "{model}", p.e.opts.Model).Replace(o.Topic)),
		}
		ln, at, err := p.listenEvents(had.events, shifted(o.Endpoint, r))
		if err != nil {
			return err
		}
		bound[r].events = at
		v.pub = zmtp.NewPub(ln, o.HWM)
		q.events, q.cache.evicted = v, v.evict // from here on closed with the process
		if o.Replay != "" {
			if ln, at, err = p.listenEvents(had.replay, shifted(o.Replay, r)); err != nil {
				return err
			}
			bound[r].replay = at
			v.router = zmtp.NewRouter(ln, v.answerReplay)
		}
		if kept != nil && o.ClearOnStart {
			v.cleared()
		}
	}
	p.e.mu.Lock()
	p.e.eventAddrs = bound
	p.e.mu.Unlock()
	return nil
}

func (p *process) listenEvents(had netip.AddrPort, endpoint string) (net.Listener, netip.AddrPort, error) {
	if !had.IsValid() {
		port, _ := endpointPort(endpoint)                     // checked
		had = netip.AddrPortFrom(p.addr.Addr(), uint16(port)) //nolint:gosec // checked
	}
	ln, err := listen(had.String())
	if err != nil {
		return nil, had, fmt.Errorf("KV events: %w", err)
	}
	at, err := netip.ParseAddrPort(ln.Addr().String())
	if err != nil {
		return nil, had, fmt.Errorf("KV events: %w", err)
	}
	return ln, at, nil
}

// eventPorts are the addresses of all ranks' events.
func (e *Engine) eventPorts() (ports []netip.AddrPort) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, a := range e.eventAddrs {
		ports = append(ports, a.events)
		if a.replay.IsValid() {
			ports = append(ports, a.replay)
		}
	}
	return ports
}

// KVEventsPort is the port on which a data-parallel rank publishes its KV events; 0 where it does not, or before Start.
func (e *Engine) KVEventsPort(rank int) int { return int(e.eventAddrsOf(rank).events.Port()) }

// KVReplayPort is the port on which a data-parallel rank answers replay requests; 0 where it does not, or before Start.
func (e *Engine) KVReplayPort(rank int) int { return int(e.eventAddrsOf(rank).replay.Port()) }

func (e *Engine) eventAddrsOf(rank int) eventAddrs {
	e.mu.Lock()
	defer e.mu.Unlock()
	if rank < 0 || rank >= len(e.eventAddrs) {
		return eventAddrs{}
	}
	return e.eventAddrs[rank]
}

// eventSource is what /kv_event_sources tells of one rank.
type eventSource struct {
	Enabled   bool    `json:"enable_kv_cache_events"`
	Publisher string  `json:"publisher"`
	Endpoint  string  `json:"endpoint"`
	Replay    *string `json:"replay_endpoint"`
	Buffer    int     `json:"buffer_steps"`
	HWM       int     `json:"hwm"`
	Queue     int     `json:"max_queue_size"`
	Topic     string  `json:"topic"`
}

// serveEventSources answers where each rank publishes, with the ports that were taken.
func (p *process) serveEventSources(x *exchange) {
	out := map[string]eventSource{}
	for r, q := range p.ranks {
		if q.events == nil {
			x.json(http.StatusNotFound, []byte(`{"detail":"Not Found"}`))
			return
		}
		o, a := q.events.opts, p.e.eventAddrsOf(r)
		s := eventSource{
			Enabled: true, Publisher: "zmq", Endpoint: "tcp://*:" + strconv.Itoa(int(a.events.Port())), Buffer: o.BufferSteps, HWM: o.HWM,
			Queue: o.HWM, Topic: string(q.events.topic),
		}
		if q.events.router != nil {
			s.Replay = new("tcp://*:" + strconv.Itoa(int(a.replay.Port())))
		}
		out[strconv.Itoa(r)] = s
	}
	x.json(http.StatusOK, marshal(out))
}
