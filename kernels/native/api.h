// What every function of the C interface shares.
//
// A function returns null, or the text of its error, which lives until the thread's next one.
#pragma once

#include <exception>

#define PIO_API extern "C" __attribute__((visibility("default")))

namespace pio {

// Keeps a copy of `text` for the calling thread.
const char* keep_error(const char* text);

// Runs `body`; an exception becomes an error text.
template <class Body>
const char* guarded(Body body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    return keep_error(error.what());
  } catch (...) {
    return keep_error("an exception of an unknown kind");
  }
}

}  // namespace pio
