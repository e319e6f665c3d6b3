// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"bytes"
	"compress/gzip"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	metricsType      = "text/plain; version=1.0.0; charset=utf-8" // of /metrics
	metricsSlashType = "text/plain; version=0.0.4; charset=utf-8" // of /metrics/ and of HEAD
	openMetricsType  = "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores"
)

// serveMetrics answers both forms of the page. /metrics ignores Accept, Accept-Encoding and the filter; /metrics/ is
// another handler, which honours them.
func (p *process) serveMetrics(x *exchange) {
	if p.e.opts.Engine != engineTRTLLM && strings.HasPrefix(x.r.URL.Path, "/prometheus") {
		x.json(http.StatusNotFound, []byte(`{"detail":"Not Found"}`))
		return
	}
	f := p.e.faults.get()
	switch f.Metrics {
	case metricsHang:
		<-x.r.Context().Done()
		return
	case metricsServerError:
		x.w.WriteHeader(http.StatusInternalServerError)
		return
	}
	h := x.w.Header()
	slash := strings.HasSuffix(x.r.URL.Path, "/")
	if !slash && x.r.Method == http.MethodHead {
		h["Content-Type"] = []string{metricsSlashType}
		return
	}
	var names []string
	if slash {
		names = x.r.URL.Query()["name[]"]
	}
	buf, _ := pageBuffers().Get().(*[]byte)
	defer pageBuffers().Put(buf)
	*buf = p.metricsPage((*buf)[:0], names, f)
	if slash {
		x.slashPage(*buf)
		return
	}
	h["Content-Type"] = []string{metricsType}
	h["Content-Length"] = []string{strconv.Itoa(len(*buf))}
	_, _ = x.w.Write(*buf)
}

// pageBuffers are reused between scrapes.
var pageBuffers = sync.OnceValue(func() *sync.Pool {
	return &sync.Pool{New: func() any { return new(make([]byte, 0, 72<<10)) }}
})

// compressors are reused: one holds most of a megabyte.
var compressors = sync.OnceValue(func() *sync.Pool {
	return &sync.Pool{New: func() any { return gzip.NewWriter(nil) }}
})

// slashPage sends a page as prometheus_client's own handler does: chunked, compressed and as OpenMetrics if asked.
func (x *exchange) slashPage(page []byte) {
	h := x.w.Header()
	h["Content-Type"] = []string{metricsSlashType}
	if strings.Contains(x.r.Header.Get("Accept"), "application/openmetrics-text") {
		h["Content-Type"] = []string{openMetricsType}
		page = openMetrics(page)
	}
	if strings.Contains(x.r.Header.Get("Accept-Encoding"), "gzip") {
		h["Content-Encoding"] = []string{"gzip"}
		z, _ := compressors().Get().(*gzip.Writer)
		defer compressors().Put(z)
		z.Reset(x.w)
		_, _ = z.Write(page)
		_ = z.Close()
	} else {
		_, _ = x.w.Write(page)
	}
	_ = http.NewResponseController(x.w).Flush() // makes a short answer chunked
}

// openMetrics rewrites a page: metric names with _ for :, counters declared without _total, an end mark.
func openMetrics(page []byte) []byte {
	var b strings.Builder
	for line := range strings.Lines(string(page)) {
		if !strings.HasPrefix(line, "#") {
			end := max(strings.IndexAny(line, "{ "), 0)
			b.WriteString(strings.Replace(line[:end], ":", "_", 1) + line[end:])
			continue
		}
		name := strings.Fields(line)[2]
		if strings.HasSuffix(name, "_created") {
			continue
		}
		if bytes.Contains(page, []byte("# TYPE "+name+" counter\n")) {
			line = strings.Replace(line, name, strings.TrimSuffix(name, "_total"), 1)
		}
		b.WriteString(line)
	}
	b.WriteString("# EOF\n")
	return []byte(b.String())
}

// freeze keeps the values of the first page made while the page is frozen, for every form of it.
func (s *faultState) freeze(rank int, m *meter) *meter {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.frozen[rank] == nil {
		s.frozen[rank] = m.clone()
	}
	return s.frozen[rank]
}

// pageKey is that of the engine's page.
func (o Options) pageKey() pageKey {
	k := pageKey{
		model: o.Model, generation: o.Generation, blockSize: o.BlockSize, blocks: o.NumBlocks,
		maxLoRAs: o.MaxLoRAs, padding: o.MetricsPage.Padding,
	}
	if o.Engine == engineSGLang || o.Engine == engineTRTLLM {
		k.engine, k.mode = o.Engine, "unified"
		if o.Role == phasePrefill || o.Role == phaseDecode {
			k.mode = o.Role
		}
	}
	return k
}

// metricsPage appends the page, or the part of it that names select.
func (p *process) metricsPage(dst []byte, names []string, f Faults) []byte {
	if len(p.ranks) > 1 {
		return p.ranksPage(dst, names, f)
	}
	o := &p.e.opts
	pg := p.e.registry.page(o.pageKey())
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gauges(f)
	m := &p.meter
	if f.Metrics == metricsFrozen {
		m = p.e.faults.freeze(0, m)
	}
	for i := range pg.families {
		fam := &pg.families[i]
		if f.Metrics == metricsMissing && isGauge(fam.name) {
			continue
		}
		dst = m.family(dst, fam, names, o.MaxLoRAs)
	}
	return dst
}

// isGauge reports whether a family is one of the load gauges that faults take away.
func isGauge(name string) bool {
	for _, end := range []string{"_cache_usage_perc", "_reqs", ":token_usage", "_kv_cache_utilization"} {
		if strings.HasSuffix(name, end) {
			return true
		}
	}
	return strings.HasPrefix(name, "vllm:num_requests_") || strings.HasPrefix(name, "trtllm_num_requests_")
}

// gauges brings the gauges up to date.
func (p *process) gauges(f Faults) {
	m, s := &p.meter, metricSlots()
	capacity, adapter := p.waiting()
	set := func(slot, v int) { m.values[slot] = float64(v) }
	set(s.running, p.running)
	set(s.waiting, capacity+adapter+p.deferred)
	set(s.capacity, capacity)
	set(s.deferred, p.deferred+adapter)
	set(s.fetching, p.fetching)
	m.values[s.usage] = p.cache.usage()
	p.derive()
	idle := p.running+capacity+adapter+p.deferred == 0
	switch {
	case f.Metrics == metricsNaN, idle && p.e.opts.MetricsPage.IdleNaN:
		for _, slot := range []int{s.running, s.waiting, s.capacity, s.deferred, s.usage} {
			m.values[slot] = math.NaN()
		}
	case f.Metrics == metricsContradictory:
		set(s.running, -1)
		set(s.waiting, 0)
		set(s.capacity, 1000)
		m.values[s.usage] = 1.7
	}
	if p.opts.MaxLoRAs > 0 {
		p.loraGauge()
	}
}

// loraGauge adds or touches the series of the adapters in use now.
func (p *process) loraGauge() {
	var now loraSeries
	now.at = unixSeconds(time.Now())
	run := make([]string, 0, len(p.adapters))
	var wait []string
	for name := range p.adapters {
		run = append(run, name)
	}
	for el := p.queue.Front(); el != nil; el = el.Next() {
		if g := el.Value.(*ticket).g; g.lora != "" && !slices.Contains(wait, g.lora) {
			wait = append(wait, g.lora)
		}
	}
	slices.Sort(run)
	slices.Sort(wait)
	now.running, now.waiting = strings.Join(run, ","), strings.Join(wait, ",")
	for i, old := range p.meter.lora {
		if old.running == now.running && old.waiting == now.waiting {
			p.meter.lora[i].at = now.at
			return
		}
	}
	p.meter.lora = append(p.meter.lora, now)
}

// family appends one family, or those of its samples that names select.
func (m *meter) family(dst []byte, f *family, names []string, maxLoRAs int) []byte {
	if len(names) > 0 && !f.has(names) {
		return dst
	}
	dst = append(dst, f.head...)
	if f.dynamic {
		dst = m.loraLines(dst, maxLoRAs)
	}
	for i := range f.samples {
		s := &f.samples[i]
		if len(names) > 0 && !slices.Contains(names, s.name) {
			continue
		}
		dst = append(dst, s.prefix...)
		switch s.slot {
		case fixedValue:
			dst = append(dst, s.fixed...)
		case startTime:
			dst = append(dst, m.created...)
		default:
			dst = appendFloat(dst, m.values[s.slot])
		}
		dst = append(dst, '\n')
	}
	return dst
}

func (m *meter) loraLines(dst []byte, maxLoRAs int) []byte {
	for _, l := range m.lora {
		dst = append(dst, loraFamily+`{max_lora="`...)
		dst = strconv.AppendInt(dst, int64(maxLoRAs), 10)
		dst = append(dst, `",running_lora_adapters="`+l.running+`",waiting_lora_adapters="`+l.waiting+`"} `...)
		dst = appendFloat(dst, l.at)
		dst = append(dst, '\n')
	}
	return dst
}
