// SPDX-License-Identifier: Apache-2.0

package scheduler_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

func pdPool() *pool.Snapshot {
	return pooltest.Snapshot(
		pooltest.E("p0").Role("prefill").Waiting(3), pooltest.E("p1").Role("prefill"),
		pooltest.E("d0").Role("decode").Waiting(3), pooltest.E("d1").Role("decode"),
		pooltest.E("e0").Role("encode"))
}

const long = 4096 // bytes: 1,024 tokens

func TestPhases(t *testing.T) {
	always := `{type: disagg-profile-handler, parameters: {deciders: {prefill: always-disagg-pd-decider, encode: always-disagg-multimodal-decider}}}`
	byPrefix := `{type: disagg-profile-handler, parameters: {deciders: {prefill: prefix-based-pd-decider}}}`
	prefillFirst := `{type: disagg-profile-handler, parameters: {stageOrder: prefill-first, deciders: {encode: always-disagg-multimodal-decider}}}`
	type want struct{ Decode, Prefill, PrefillReason, Encode, EncodeReason string }
	unserved := map[string]bool{"no prefiller in the pool": true, "prefill first, none in the pool": true, "the prefiller is down": true}
	f := func(name, handler string, bytes int, change func(*scheduler.Query), w want) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			q := query(pdPool(), strings.Repeat("a", bytes))
			if change != nil {
				change(q)
			}
			d, err := load(t, twoProfiles(handler)).Schedule(q)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Release()
			p, e := d.Phase(scheduler.PhasePrefill), d.Phase(scheduler.PhaseEncode)
			got := want{names(d.Phase(scheduler.PhaseDecode)), names(p), p.Reason, names(e), e.Reason}
			if diff := cmp.Diff(w, got); diff != "" {
				t.Error(diff)
			}
			if p.Run != (len(p.Ranked) > 0) || e.Run != (len(e.Ranked) > 0) {
				t.Errorf("Run does not say whether endpoints are ranked: %+v %+v", p, e)
			}
			if p.Wanted != unserved[name] || e.Wanted {
				t.Errorf("Wanted does not say whether endpoints were missing: %+v %+v", p, e)
			}
		})
	}
	image := func(q *scheduler.Query) {
		q.Request.Media = []inference.Media{{Kind: "image_url", Span: inference.Span{Start: 0, End: 10}}}
	}
	f("long prompt", byPrefix, long, nil, want{"d1", "p1", "uncached prompt", "", "no profile"})
	f("short prompt", byPrefix, 40, nil, want{"d1", "", "short prompt", "", "no profile"})
	f("always", always, 4, nil, want{"d1", "p1", "always", "", "no media"})
	f("with an image", always, 4, image, want{"d1", "p1", "always", "", "no encoder connector is configured (disaggregation.ecConnector)"})
	f("prefill first", prefillFirst, 4, image, want{"d1", "p1", "prefill-first", "", "no encoder connector is configured (disaggregation.ecConnector)"})
	f("only decode", always, long, func(q *scheduler.Query) { q.OnlyDecode, q.OnlyReason = true, "echo" }, want{"d1", "", "echo", "", "echo"})
	f("prefill first, only decode", prefillFirst, long, func(q *scheduler.Query) { q.OnlyDecode, q.OnlyReason = true, "off" }, want{"d1", "", "off", "", "off"})
	f("no prefiller in the pool", always, long, func(q *scheduler.Query) {
		q.Snapshot = pooltest.Snapshot(pooltest.E("d0").Role("decode"), pooltest.E("d1").Role("decode").Waiting(1))
	}, want{"d0", "", "role does not prefill", "", "no media"})
	f("prefill first, none in the pool", prefillFirst, long, func(q *scheduler.Query) {
		q.Snapshot = pooltest.Snapshot(pooltest.E("d0").Role("decode"))
	}, want{"d0", "", "role does not prefill", "", "no media"})
	f("the prefiller is down", always, long, func(q *scheduler.Query) {
		q.Snapshot = pooltest.Snapshot(pooltest.E("p0").Role("prefill"), pooltest.E("d0").Role("decode"))
		q.Snapshot.Endpoints[0].Health.SetReady(false)
	}, want{"d0", "", "not ready", "", "no media"})
	f("the only prefiller decodes", always, long, func(q *scheduler.Query) {
		q.Snapshot = pooltest.Snapshot(pooltest.E("b0").Role("both"))
	}, want{"b0", "", "it decodes this request", "", "no media"})
	f("both roles", always, long, func(q *scheduler.Query) {
		q.Snapshot = pooltest.Snapshot(pooltest.E("b0").Role("both"), pooltest.E("b1").Role("both").Waiting(1))
	}, want{"b0", "b1", "always", "", "no media"})
	f("ranked as far as asked", always, long, func(q *scheduler.Query) { q.Rank = 3 }, want{"d1 d0", "p1 p0", "always", "", "no media"})
}

// panicking is a scorer with a mistake in it.
type panicking struct{}

func (panicking) Score(*scheduler.Cycle, []scheduler.Candidate, []float64) { panic("mistake") }

// TestPanicKeepsNoReservation: the phases before the one whose plugin panics have reserved already.
func TestPanicKeepsNoReservation(t *testing.T) {
	broken := func(o *scheduler.Options) {
		o.Plugins = append(o.Plugins, scheduler.Registry{
			"panicking": func(*scheduler.Builder, config.Parameters) (any, error) { return panicking{}, nil },
		})
	}
	f := func(handler, phase string) {
		t.Helper()
		text := twoProfiles(handler)
		text = strings.Replace(text, "- {type: queue-scorer}", "- {type: queue-scorer}\n- {type: panicking}", 1)
		text = strings.Replace(text, "{pluginRef: "+phase+"-filter}", "{pluginRef: "+phase+"-filter}, {pluginRef: panicking}", 1)
		q := query(pdPool(), strings.Repeat("a", long))
		q.Reserve = true
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", phase)
				}
			}()
			_, _ = load(t, text, broken).Schedule(q)
		}()
		for _, e := range q.Snapshot.Endpoints {
			if n, tokens := e.Load.Requests(), e.Load.Tokens(); n != 0 || tokens != 0 {
				t.Errorf("%s: %s keeps %d requests, %d tokens", phase, e.Name, n, tokens)
			}
		}
	}
	f(`{type: disagg-profile-handler, parameters: {deciders: {prefill: always-disagg-pd-decider}}}`, "prefill")
	f(`{type: disagg-profile-handler, parameters: {stageOrder: prefill-first}}`, "decode")
}

// TestCachedPromptStaysOnDecode: what the decode endpoint has cached decides, not the prompt's length.
func TestCachedPromptStaysOnDecode(t *testing.T) {
	s, snap := load(t, pdSample), pdPool()
	d0 := snap.Endpoints[2]
	q := query(snap, strings.Repeat("a", long))
	q.Snapshot = pooltest.Snapshot(pooltest.E("p0").Role("prefill"))
	q.Snapshot = pool.NewSnapshot(2, true, []*pool.Endpoint{snap.Endpoints[0], d0})
	reason := func() string {
		t.Helper()
		d, err := s.Schedule(q)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Release()
		return d.Phase(scheduler.PhasePrefill).Reason
	}
	if got := reason(); got != "uncached prompt" {
		t.Errorf("new prompt: %s", got)
	}
	s.Learn(q.Request, d0, snap.Endpoints[0])
	if got := reason(); got != "prompt cached on the decode endpoint" {
		t.Errorf("known prompt: %s", got)
	}
	s.Forget(d0.Slot)
	if got := reason(); got != "uncached prompt" {
		t.Errorf("after the endpoint went: %s", got)
	}
}

func TestDecisionTellsWhatIsCached(t *testing.T) {
	s, snap := load(t, pdSample), pdPool()
	q := query(snap, strings.Repeat("a", long))
	d, err := s.Schedule(q)
	if err != nil {
		t.Fatal(err)
	}
	first := d.Phase(scheduler.PhaseDecode).Ranked[0]
	d.Learn(first.Endpoint, nil)
	d.Release()
	if first.UncachedTokens != 1024 || first.ReserveTokens != 1024 || first.Matched != 0 {
		t.Errorf("cold: %+v", first)
	}
	q.Rank = 5
	if d, err = s.Schedule(q); err != nil {
		t.Fatal(err)
	}
	defer d.Release()
	if d.Prompt != (scheduler.Prompt{Blocks: 16, BlockSize: 64, Tokens: 1024}) {
		t.Errorf("prompt %+v", d.Prompt)
	}
	for _, r := range d.Phase(scheduler.PhaseDecode).Ranked {
		if r.Endpoint == first.Endpoint && (r.Matched != 16 || r.UncachedTokens != 0) {
			t.Errorf("warm: %+v", r)
		}
	}
}

func TestNoCandidate(t *testing.T) {
	f := func(name string, snap *pool.Snapshot, subset scheduler.Subset, want *scheduler.NoCandidateError) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			q := query(snap, "x")
			q.Subset, q.Reserve = subset, true
			d, err := load(t, twoProfiles(`{type: disagg-profile-handler, parameters: {stageOrder: prefill-first}}`)).Schedule(q)
			if d != nil || !errors.Is(err, scheduler.ErrNoCandidate) {
				t.Fatalf("%v, %v, want ErrNoCandidate", d, err)
			}
			var got *scheduler.NoCandidateError
			if !errors.As(err, &got) || cmp.Diff(want, got) != "" {
				t.Error(cmp.Diff(want, got))
			}
			if err.Error() == "" {
				t.Error("no text")
			}
			for _, e := range snap.Endpoints {
				if n := e.Load.Requests(); n != 0 {
					t.Errorf("%s keeps %d reservations", e.Name, n)
				}
			}
		})
	}
	f("empty pool", pooltest.Snapshot(), scheduler.Subset{}, &scheduler.NoCandidateError{Profile: "decode"})
	f("prefillers only", pooltest.Snapshot(pooltest.E("p0").Role("prefill")), scheduler.Subset{}, &scheduler.NoCandidateError{
		Profile: "decode", Removed: []scheduler.Removal{{By: "decode-filter", Reason: "role does not decode", Count: 1}},
	})
	f("empty subset", pdPool(), scheduler.Subset{Given: true}, &scheduler.NoCandidateError{
		Profile: "decode", Removed: []scheduler.Removal{{By: scheduler.BySubset, Reason: "not in the gateway's subset", Count: 5}},
	})
}

// TestPairLabels: prefill and decode agree on the labels of disaggregation.pairLabels, in either order.
func TestPairLabels(t *testing.T) {
	snap := pooltest.Snapshot(
		pooltest.E("p-old").Role("prefill").Label("rev", "1"), pooltest.E("p-new").Role("prefill").Label("rev", "2").Waiting(5),
		pooltest.E("d-old").Role("decode").Label("rev", "1").Waiting(5), pooltest.E("d-new").Role("decode").Label("rev", "2"))
	f := func(order, want string) {
		t.Helper()
		text := twoProfiles(`{type: disagg-profile-handler, parameters: {`+order+`}}`) + "disaggregation: {pairLabels: [rev]}\n"
		d, err := load(t, text).Schedule(query(snap, "x"))
		if err != nil {
			t.Fatal(err)
		}
		defer d.Release()
		if got := names(d.Phase(scheduler.PhasePrefill)) + " " + names(d.Phase(scheduler.PhaseDecode)); got != want {
			t.Errorf("%s: %s, want %s", order, got, want)
		}
	}
	f("deciders: {prefill: always-disagg-pd-decider}", "p-new d-new")
	f("stageOrder: prefill-first", "p-old d-old")
}

// TestPairs: whoever moves decode to another endpoint asks the same as the scheduler's own cut.
func TestPairs(t *testing.T) {
	snap := pooltest.Snapshot(pooltest.E("a").Label("rev", "1"), pooltest.E("b").Label("rev", "1"), pooltest.E("c").Label("rev", "2"), pooltest.E("d"))
	labelled, plain := load(t, "disaggregation: {pairLabels: [rev]}\n"), load(t, "")
	f := func(prefill, decode int, wantLabelled, wantPlain bool) {
		t.Helper()
		again := *snap.Endpoints[decode] // as another snapshot has it
		if got := labelled.Pairs(snap.Endpoints[prefill], &again); got != wantLabelled {
			t.Errorf("%d and %d with labels: %v", prefill, decode, got)
		}
		if got := plain.Pairs(snap.Endpoints[prefill], &again); got != wantPlain {
			t.Errorf("%d and %d: %v", prefill, decode, got)
		}
	}
	f(0, 1, true, true)
	f(0, 2, false, true)
	f(0, 3, false, true)
	f(0, 0, false, false)
	f(3, 3, false, false)
}

func TestRepick(t *testing.T) {
	s, snap := load(t, twoProfiles(`{type: disagg-profile-handler}`)), pdPool()
	q := query(snap, "x")
	q.Rank, q.Reserve = 2, true
	pick, err := s.Repick(q, scheduler.PhaseDecode, snap.Endpoints[0])
	if err != nil || names(&pick) != "d1 d0" {
		t.Errorf("%s, %v, want d1 d0", names(&pick), err)
	}
	if pick.Reservation != nil || snap.Endpoints[3].Load.Requests() != 0 {
		t.Error("a repick reserved")
	}
	q.Snapshot = pooltest.Snapshot()
	if _, err = s.Repick(q, scheduler.PhaseDecode, nil); !errors.Is(err, scheduler.ErrNoCandidate) {
		t.Errorf("%v, want ErrNoCandidate", err)
	}
	if pick, err = load(t, "").Repick(q, scheduler.PhasePrefill, nil); pick.Run || err != nil {
		t.Errorf("%+v, %v for a phase without a profile", pick, err)
	}
}

// TestRoleGuard: without a configuration, prefill-only endpoints never get plain traffic; with one, its filters decide.
func TestRoleGuard(t *testing.T) {
	snap := pooltest.Snapshot(pooltest.E("p").Role("prefill"), pooltest.E("d").Role("decode").Waiting(9), pooltest.E("odd").Role("nonsense"))
	pick := func(s *scheduler.Scheduler) string {
		d, err := s.Schedule(query(snap, "x"))
		if err != nil {
			t.Fatal(err)
		}
		defer d.Release()
		return names(d.Phase(scheduler.PhaseDecode))
	}
	s := load(t, "")
	if got := pick(s); got != "d" || !s.Guards() {
		t.Errorf("built-in default picks %s, guards %v", got, s.Guards())
	}
	s = load(t, "plugins: [{type: queue-scorer}]")
	if got := pick(s); got == "d" || s.Guards() {
		t.Errorf("a file without a role filter picks %s, guards %v", got, s.Guards())
	}
}

func TestTrace(t *testing.T) {
	s := load(t, pdSample, func(o *scheduler.Options) { o.Trace = true })
	q := query(pdPool(), strings.Repeat("a", long))
	q.Snapshot.Endpoints[3].Health.SetReady(false)
	d, err := s.Schedule(q)
	if err != nil {
		t.Fatal(err)
	}
	trace := d.Trace
	d.Release()
	type row struct {
		Name, RemovedBy string
		Rank, Scores    int
	}
	var got []any
	for _, p := range trace.Profiles {
		got = append(got, p.Profile, p.Phase.String(), p.Scorers)
		for _, r := range p.Rows {
			got = append(got, row{r.Endpoint.Name, r.RemovedBy, r.Rank, len(r.Scores)})
		}
	}
	want := []any{
		"decode", "decode",
		[]string{"active-request-scorer", "kv-cache-utilization-scorer"},
		row{"p0", "decode-filter", 0, 0},
		row{"p1", "decode-filter", 0, 0},
		row{"d0", "", 1, 2},
		row{"e0", "decode-filter", 0, 0},
		row{"d1", "health", 0, 0},
		"prefill", "prefill",
		[]string{"prefix-cache-scorer", "token-load-scorer"},
		row{"p0", "", 0, 2},
		row{"p1", "", 0, 2},
		row{"d0", "prefill-filter", 0, 0},
		row{"e0", "prefill-filter", 0, 0},
		row{"d1", "health", 0, 0},
	}
	for i, v := range got { // one of the two equal prefillers is first
		if r, ok := v.(row); ok && strings.HasPrefix(r.Name, "p") {
			r.Rank = 0
			got[i] = r
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
