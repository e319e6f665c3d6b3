// SPDX-License-Identifier: Apache-2.0

package metricsscraper

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/baton-epp/baton/pool"
)

const (
	// idleTimeout is below the 5 s after which vLLM closes an idle connection (measured on vLLM 0.32).
	idleTimeout = 4 * time.Second
	// filteredMax is the largest page that is taken for a filtered one: real ones have 1 to 3 KB, whole ones 48 to 70.
	filteredMax = 16 << 10
)

// Why a scrape failed, beside errors of the network.
var (
	errStatus   = errors.New("status is not 200")
	errTooLarge = errors.New("page is larger than maxPageBytes")
	errNoMetric = errors.New("page has none of the engine's families")
)

// The values of the error counter's label reason.
const (
	reasonRefused    = "refused"
	reasonStatus     = "status"
	reasonTooLarge   = "too_large"
	reasonNoMetric   = "no_metric"
	reasonTimeout    = "timeout"
	reasonConnection = "connection"
)

func reasons() []string {
	return []string{reasonRefused, reasonStatus, reasonTooLarge, reasonNoMetric, reasonTimeout, reasonConnection}
}

// reason is an error's metric label.
func reason(err error) string {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return reasonRefused
	case errors.Is(err, errStatus):
		return reasonStatus
	case errors.Is(err, errTooLarge):
		return reasonTooLarge
	case errors.Is(err, errNoMetric):
		return reasonNoMetric
	case isTimeout(err):
		return reasonTimeout
	default:
		return reasonConnection
	}
}

func isTimeout(err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return ok && ne.Timeout() || errors.Is(err, context.DeadlineExceeded)
}

// newClient makes the client all loops share: kept connections, no proxy, no redirects, nothing compressed.
func newClient(src Source, timeout time.Duration) (*http.Client, error) {
	conf := &tls.Config{InsecureSkipVerify: src.InsecureSkipVerify} //nolint:gosec // llm-d's default, said in the docs
	if src.CACertPath != "" {
		pem, err := os.ReadFile(src.CACertPath)
		if err != nil {
			return nil, fmt.Errorf("metrics-data-source caCertPath: %w", err)
		}
		if conf.RootCAs = x509.NewCertPool(); !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("metrics-data-source caCertPath: no certificate in %s", src.CACertPath)
		}
	}
	if src.ClientCertPath != "" {
		cert, err := tls.LoadX509KeyPair(src.ClientCertPath, src.ClientKeyPath)
		if err != nil {
			return nil, fmt.Errorf("metrics-data-source clientCertPath: %w", err)
		}
		conf.Certificates = []tls.Certificate{cert}
	}
	dialer := &net.Dialer{Timeout: timeout}
	return &http.Client{
		Transport: &http.Transport{
			DialContext:            dialer.DialContext,
			TLSClientConfig:        conf,
			TLSHandshakeTimeout:    timeout,
			IdleConnTimeout:        idleTimeout,
			MaxIdleConnsPerHost:    1,
			MaxResponseHeaderBytes: 64 << 10,
			DisableCompression:     true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// mode is what is known of the server's name filter.
type mode uint8

const (
	modeUnknown mode = iota // to be tried
	modeFiltered
	modeWhole
)

// page is a buffer for one body, shared by the loops.
type page struct{ body []byte }

// fetcher asks one endpoint for its pages. It belongs to the endpoint's loop.
type fetcher struct {
	scraper                      *Scraper
	table                        *table
	whole, filtered, withCaching *http.Request
	mode                         mode
	cacheAsked                   time.Time
}

func (s *Scraper) newFetcher(ctx context.Context, e *pool.Endpoint, t *table) fetcher {
	addr := e.Addr
	if s.opts.Source.Port != 0 {
		addr = netip.AddrPortFrom(addr.Addr(), s.opts.Source.Port)
	}
	url := s.opts.Source.Scheme + "://" + addr.String() + s.opts.Source.Path
	f := fetcher{scraper: s, table: t, whole: request(ctx, url)}
	if f.mode = modeWhole; s.filter && t.always != "" {
		f.mode = modeUnknown
		f.filtered, f.withCaching = request(ctx, url+"/?"+t.names), request(ctx, url+"/?"+t.namesCached)
	}
	return f
}

// request is a GET to an address of the snapshot; nil when the path is no URL path.
func request(ctx context.Context, url string) *http.Request {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return nil
	}
	// Not OpenMetrics, which changes names; compressed pages would cost the engine.
	req.Header.Set("Accept", "text/plain;version=0.0.4")
	req.Header.Set("Accept-Encoding", "identity")
	req.Header.Set("User-Agent", "baton")
	return req
}

// fetch reads a page into r. withCache is false when the page was asked for without cache information. What is known
// of the name filter is decided anew after every error, since another server may be there by then.
func (f *fetcher) fetch(ctx context.Context, now time.Time, r *reading) (withCache bool, err error) {
	if f.mode != modeWhole {
		withCache = f.mode == modeUnknown || now.Sub(f.cacheAsked) >= cacheEvery
		req := f.filtered
		if withCache {
			req = f.withCaching
		}
		size, err := f.get(ctx, req, r)
		switch {
		case err == nil && size <= filteredMax && r.n[sigRunning] > 0:
			f.mode = modeFiltered
			if withCache {
				f.cacheAsked = now
			}
			return withCache, nil
		case err == nil && r.n[sigRunning] > 0: // the whole page: the server does not know the parameter
			f.mode = modeWhole
			return true, nil
		case err != nil && !errors.Is(err, errStatus) && !errors.Is(err, errNoMetric):
			f.forget()
			return false, err
		}
		f.mode = modeWhole
	}
	if _, err := f.get(ctx, f.whole, r); err != nil {
		f.forget()
		return false, err
	}
	return true, nil
}

// forget makes the next scrape try the name filter again.
func (f *fetcher) forget() {
	if f.scraper.filter && f.table.always != "" {
		f.mode = modeUnknown
	}
}

// get sends one request and scans the body.
func (f *fetcher) get(ctx context.Context, req *http.Request, r *reading) (size int, err error) {
	r.reset()
	if req == nil {
		return 0, fmt.Errorf("%w: the metrics path is no URL path", errStatus)
	}
	ctx, cancel := context.WithTimeout(ctx, f.scraper.opts.Scraping.Timeout)
	defer cancel()
	resp, err := f.scraper.client.Do(req.WithContext(ctx))
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	buf, _ := f.scraper.buffers.Get().(*page)
	defer f.scraper.buffers.Put(buf)
	limit := f.scraper.opts.Scraping.MaxPageBytes
	err = buf.read(io.LimitReader(resp.Body, limit+1))
	f.scraper.metrics.bytes.Add(float64(len(buf.body)))
	switch {
	case err != nil:
		return 0, fmt.Errorf("read page: %w", err)
	case int64(len(buf.body)) > limit:
		return 0, fmt.Errorf("%w (%d)", errTooLarge, limit)
	case resp.StatusCode != http.StatusOK:
		return 0, fmt.Errorf("%w: %s", errStatus, resp.Status)
	}
	f.table.scan(buf.body, r)
	if !r.seen {
		return 0, errNoMetric
	}
	return len(buf.body), nil
}

// read fills the buffer, which keeps its size from page to page.
func (p *page) read(from io.Reader) error {
	if p.body == nil {
		p.body = make([]byte, 0, 8<<10)
	}
	p.body = p.body[:0]
	for {
		if len(p.body) == cap(p.body) {
			p.body = append(p.body, 0)[:len(p.body)]
		}
		n, err := from.Read(p.body[len(p.body):cap(p.body)])
		p.body = p.body[:len(p.body)+n]
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
