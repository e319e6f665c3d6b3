// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"time"
)

// mooncake is vLLM's MooncakeConnector: both legs are sent at once and meet by a transfer_id, the decode leg finds the
// prefill engine by its bootstrap server. Known from its source, not from a run.
type mooncake struct {
	p        *process
	declined map[string]time.Time // transfer ids whose decode leg left before the prefill ended; guarded by p.mu
}

// mooncakeWait is VLLM_MOONCAKE_CONNECTOR_TIMEOUT: how long a decode leg waits for its prefill, before scaling.
const mooncakeWait = 30 * time.Second

func newMooncake(p *process) wire { return &mooncake{p: p} }

func (m *mooncake) stop() {}

// mooncakeLeg is a leg of either kind.
type mooncakeLeg struct {
	m         *mooncake
	id        string // transfer_id
	prefill   bool
	bootstrap string // remote_bootstrap_addr
	engineID  string // remote_engine_id
	peer      *process
	fetched   bool
}

func (m *mooncake) read(c *call, _ *fields) (leg, *apiError) {
	sub := c.params(memberTransfer)
	if sub == nil {
		return nil, nil
	}
	l := &mooncakeLeg{
		m: m, id: sub.text("transfer_id"), prefill: sub.boolean("do_remote_decode"),
		bootstrap: sub.text("remote_bootstrap_addr"), engineID: sub.text("remote_engine_id"),
	}
	decode := sub.boolean("do_remote_prefill")
	c.fields.adopt(sub)
	switch {
	case !l.prefill && !decode:
		return nil, nil
	case l.id == "", !l.prefill && (l.bootstrap == "" || l.engineID == ""):
		m.p.e.records.count(func(t *totals) { t.invalidParams++ })
		return nil, nil // a warning, and everything is computed locally
	}
	return l, nil
}

func (l *mooncakeLeg) phase() string {
	if l.prefill {
		return phasePrefill
	}
	return phaseTransfer
}

func (l *mooncakeLeg) load(ctx context.Context, g *group) (died string, err error) {
	if l.prefill {
		return "", nil
	}
	p := l.m.p
	var sl sleeper
	defer sl.close()
	peer, wait := p.e.registry.bootstrap(l.bootstrap, l.engineID)
	if peer == nil {
		sl.sleep(ctx, p.scaled(wait))
		p.pullFailed(l.id, "no such engine at the bootstrap server")
		return "", errLoadFailed
	}
	l.peer = peer
	if !sl.sleep(ctx, p.greet(peer)) {
		return "", errClientGone
	}
	ids, ok := peer.awaitLease(ctx, l.id, p.scaled(mooncakeWait))
	switch {
	case ctx.Err() != nil:
		return "", errClientGone
	case !ok:
		p.pullFailed(l.id, "prefill not there in time")
		return "", errLoadFailed
	}
	if ok, died = p.receive(g, peer, ids, Pull{RequestID: l.id}); !ok {
		return died, errLoadFailed
	}
	l.fetched = true
	peer.free(l.id)
	return "", nil
}

// done keeps the blocks of a prefill that its token limit ended; one that a stop ended is freed.
func (l *mooncakeLeg) done(_ context.Context, g *group) (member string, value json.RawMessage, err error) {
	if l.prefill && g.seqs[0].finish == finishLength && !l.m.wasDeclined(l.id) {
		l.m.p.keepFirst(g, l.id, l.m.p.e.timing.lease)
	}
	return "", nil, nil
}

// left lets the prefill engine free what it holds, or will hold, for a decode leg that the engine knew.
func (l *mooncakeLeg) left(g *group) {
	if l.prefill || g == nil || l.fetched {
		return
	}
	peer := l.peer
	if peer == nil {
		if peer, _ = l.m.p.e.registry.bootstrap(l.bootstrap, l.engineID); peer == nil {
			return
		}
	}
	if w, ok := peer.wire.(*mooncake); ok && !peer.free(l.id) {
		w.decline(l.id, l.m.p.scaled(mooncakeWait))
	}
}

// decline remembers for d that nobody will come for id.
func (m *mooncake) decline(id string, d time.Duration) {
	m.p.mu.Lock()
	defer m.p.mu.Unlock()
	now := time.Now()
	if m.declined == nil {
		m.declined = map[string]time.Time{}
	}
	for k, until := range m.declined {
		if until.Before(now) {
			delete(m.declined, k)
		}
	}
	m.declined[id] = now.Add(d)
}

func (m *mooncake) wasDeclined(id string) bool {
	m.p.mu.Lock()
	defer m.p.mu.Unlock()
	until, ok := m.declined[id]
	delete(m.declined, id)
	return ok && time.Now().Before(until)
}

// sideHandler is the bootstrap server: GET /query tells the engine id of each rank.
func (m *mooncake) sideHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p := m.p
		p.work.Add(1)
		defer p.work.Done()
		x := &exchange{p: p, w: w, r: r}
		if r.URL.Path != "/query" || r.Method != http.MethodGet {
			x.json(http.StatusNotFound, []byte(`{"detail":"Not Found"}`))
			return
		}
		p.e.records.body(Recorded{At: time.Now(), Method: r.Method, URI: r.RequestURI, Header: r.Header.Clone(), Phase: phaseQuery})
		x.fault = p.e.faults.pick(p.e, &call{phase: phaseQuery})
		if x.fault != nil && p.injectEarly(x) { //nolint:contextcheck // x has the request
			return
		}
		x.answerJSON(p.bootstrapTable()) //nolint:contextcheck // as above
	})
}

// bootstrapTable is the answer of /query, by data-parallel rank.
func (p *process) bootstrapTable() []byte {
	type entry struct {
		EngineID string `json:"engine_id"`
	}
	var b bytes.Buffer
	b.WriteByte('{')
	for r, q := range p.front.ranks {
		if r > 0 {
			b.WriteByte(',')
		}
		b.WriteString(strconv.Quote(strconv.Itoa(r)) + ":")
		b.Write(marshal(entry{q.id}))
	}
	b.WriteByte('}')
	return b.Bytes()
}

// bootstrap finds the rank with that engine id behind a bootstrap server's URL; nil, and how long it takes to find out,
// when there is none.
func (r *Registry) bootstrap(rawURL, engineID string) (peer *process, wait time.Duration) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, waitWrongHost
	}
	at, err := netip.ParseAddrPort(u.Host)
	if err != nil {
		return nil, waitWrongHost
	}
	for _, e := range r.all() {
		p := e.running()
		if p == nil || e.Addr().Addr() != at.Addr() || e.BootstrapPort() != int(at.Port()) {
			continue
		}
		for _, q := range p.ranks {
			if q.id == engineID {
				return q, 0
			}
		}
		return nil, waitWrongEngine
	}
	return nil, waitGone
}
