// What stands between the C surface and exceptions.
#pragma once

#include <exception>
#include <string>

namespace pw {

extern thread_local std::string last_error;  // api.cpp

// The body's result; -1, and why in `last_error`, if it throws.
template <class F>
int guarded(F body) {
  try {
    return body();
  } catch (const std::exception& e) {
    last_error = e.what();
  } catch (...) {
    last_error = "unknown error";
  }
  return -1;
}

}  // namespace pw
